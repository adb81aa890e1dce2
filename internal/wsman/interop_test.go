package wsman_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/wsman"
	"github.com/backstay/backstay/sim/hyperv/cim"
	simntlm "github.com/backstay/backstay/sim/hyperv/ntlm"
	simwsman "github.com/backstay/backstay/sim/hyperv/wsman"
)

// The simulator's service shares no code with the client. Where the two
// disagree, one of them has read the specification wrong.

const (
	simUser     = "Administrator"
	simPassword = "Pässw0rd & <more>"
)

var ctx = context.Background()

// vms is a provider of some VMs with a service, as large as the test needs.
type vms struct {
	count int
	notes string
	mu    sync.Mutex
	calls []map[string]cim.Value
}

func (p *vms) Instances(namespace, class string) []*cim.Instance {
	var all []*cim.Instance
	for i := range p.count {
		guid := fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
		vm := cim.New(cim.Virtualization, "Msvm_ComputerSystem").Put("Name", cim.Text(guid)).Put("ElementName", cim.Text(fmt.Sprint("web", i))).
			Put("TimeOfLastStateChange", cim.Text("2026-11-22T10:00:00Z"))
		settings := cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData").Put("InstanceID", cim.Text(`Microsoft:`+guid+`\a`)).
			Put("Notes", cim.List(p.notes, "second")).Put("ElementName", cim.Text(`a "b" & <c> \ d`))
		state := cim.New(cim.Virtualization, "Msvm_SettingsDefineState").Put("ManagedElement", cim.To(vm.Ref())).Put("SettingData", cim.To(settings.Ref()))
		all = append(all, vm, settings, state)
	}
	all = append(all, cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotService").Put("SystemName", cim.Text("HV01")))
	var out []*cim.Instance
	for _, i := range all {
		if i.Class.Is(class) && i.Class.Namespace == namespace {
			out = append(out, i)
		}
	}
	return out
}

func (p *vms) Invoke(_ context.Context, _ *cim.Instance, _ cim.Method, args map[string]cim.Value) (map[string]cim.Value, uint32, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, args)
	return nil, 0, nil
}

func (p *vms) Put(*cim.Instance, *cim.Instance) error {
	return simwsman.NotSupported("it is read-only")
}

// serve starts the simulator's service, and gives a client's settings for it.
func serve(t *testing.T, https bool, s *simwsman.Server) wsman.Config {
	t.Helper()
	s.Account = simntlm.Account{User: simUser, Password: simPassword}
	s.Machine, s.Now, s.Log = "HV01", time.Now, func(string, ...any) {}
	cfg := wsman.Config{User: simUser, Password: secret.New([]byte(simPassword))}
	scheme := "http"
	if https {
		cert, hash, err := simwsman.SelfSigned("HV01", time.Now(), time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		scheme, s.TLS, s.Certificate, s.RequireBinding = "https", &tls.Config{Certificates: []tls.Certificate{cert}}, hash, true
		pin := wsman.Fingerprint(hash)
		cfg.Pin = &pin
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serving, cancel := context.WithCancel(ctx)
	done := make(chan error)
	go func() { done <- s.Serve(serving, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	cfg.URL = fmt.Sprintf("%s://%s", scheme, l.Addr())
	return cfg
}

func open(t *testing.T, cfg wsman.Config) *wsman.Client {
	t.Helper()
	c, err := wsman.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestClientAgreesWithTheSimulator(t *testing.T) {
	for _, tc := range []struct {
		name  string
		https bool
		auth  wsman.Auth
	}{{"NTLM over HTTPS, bound to the certificate", true, wsman.NTLM}, {"sealed NTLM over HTTP", false, wsman.NTLM}, {"Basic over HTTPS", true, wsman.Basic}} {
		t.Run(tc.name, func(t *testing.T) {
			p := &vms{count: 3, notes: strings.Repeat("ä<&]]>", 100)}
			cfg := serve(t, tc.https, &simwsman.Server{Provider: p, Basic: true})
			cfg.Auth = tc.auth
			c := open(t, cfg)

			all, err := wsman.All(c.Enumerate(ctx, "Msvm_ComputerSystem"))
			if err != nil || len(all) != 3 || all[0].Class != "Msvm_ComputerSystem" {
				t.Fatalf("enumerate: %d, %v", len(all), err)
			}
			guid, err := wsman.Prop[string](all[1], "Name")
			if err != nil {
				t.Fatal(err)
			}
			if when, err := wsman.Prop[time.Time](all[1], "TimeOfLastStateChange"); err != nil || when.UTC().Hour() != 10 {
				t.Errorf("a time: %v, %v", when, err)
			}
			vm := wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", guid)
			got, err := c.Get(ctx, vm)
			if err != nil {
				t.Fatal(err)
			}
			if name, err := wsman.Prop[string](got, "ElementName"); err != nil || name != "web1" {
				t.Errorf("get: %q, %v", name, err)
			}
			if got.Has("InstallDate") {
				t.Error("null is a value")
			}
			refs, err := wsman.All(c.EnumerateRefs(ctx, "Msvm_ComputerSystem"))
			if err != nil || len(refs) != 3 || !refs[1].Equal(vm) {
				t.Errorf("references: %v, %v", refs, err)
			}
			links, err := wsman.All(c.Enumerate(ctx, "Msvm_SettingsDefineState"))
			if err != nil || len(links) != 3 {
				t.Fatalf("associations: %d, %v", len(links), err)
			}
			if to, err := wsman.Prop[wsman.Ref](links[1], "ManagedElement"); err != nil || !to.Equal(vm) {
				t.Errorf("an association's end: %v, %v", to, err)
			}
			found, err := wsman.All(c.Query(ctx, "SELECT * FROM Msvm_ComputerSystem WHERE Name = "+wsman.Quote(guid)))
			if err != nil || len(found) != 1 {
				t.Errorf("query: %d, %v", len(found), err)
			}
			found, err = wsman.All(c.Query(ctx, "ASSOCIATORS OF {"+vm.Path()+"} WHERE AssocClass = Msvm_SettingsDefineState ResultClass = Msvm_VirtualSystemSettingData"))
			if err != nil || len(found) != 1 {
				t.Fatalf("associators: %d, %v", len(found), err)
			}
			if notes, err := wsman.Props[string](found[0], "Notes"); err != nil || len(notes) != 2 || notes[0] != p.notes {
				t.Errorf("an array of texts: %q, %v", notes, err)
			}
			if id, err := wsman.Prop[string](found[0], "InstanceID"); err != nil || id != `Microsoft:`+guid+`\a` {
				t.Errorf("a backslash: %q, %v", id, err)
			}

			settings := wsman.NewInstance("Msvm_VirtualSystemSnapshotSettingData").Set("ConsistencyLevel", wsman.Of(uint8(1))).Set("IgnoreNonSnapshottableDisks", wsman.Of(true))
			service := wsman.NewRef("Msvm_VirtualSystemSnapshotService", "CreationClassName", "Msvm_VirtualSystemSnapshotService")
			out, err := c.Invoke(ctx, service, "CreateSnapshot", wsman.Arg("AffectedSystem", wsman.Of(vm)), wsman.Arg("SnapshotSettings", wsman.Of(settings)), wsman.Arg("SnapshotType", wsman.Of(uint16(32768))))
			if err != nil {
				t.Fatal(err)
			}
			if code, err := wsman.Prop[uint32](out, "ReturnValue"); err != nil || code != 0 || len(p.calls) != 1 {
				t.Errorf("invoke: %d, %v, %d calls", code, err, len(p.calls))
			}

			_, err = c.Get(ctx, wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", "nobody"))
			if !errors.Is(err, fault.ErrNotFound) {
				t.Errorf("no such instance: %v", err)
			}
			if _, err = wsman.All(c.Enumerate(ctx, "Msvm_Nothing")); !errors.Is(err, wsman.ErrNoClass) || errors.Is(err, fault.ErrNotFound) {
				t.Errorf("no such class: %v", err)
			}
			var f *wsman.Fault
			if _, err := c.Put(ctx, vm, wsman.NewInstance("Msvm_ComputerSystem").Set("ElementName", wsman.Of("x"))); !errors.As(err, &f) || !errors.Is(err, fault.ErrUnsupported) || f.WMI != 0x80041024 {
				t.Errorf("put: %v", err)
			}
		})
	}
}

// Answers that do not fit are a class of their own, so that the caller can ask
// for less; instances that do not fit into one answer come in several.
func TestEnvelopesOfTheSimulator(t *testing.T) {
	p := &vms{count: 40, notes: strings.Repeat("x", 2000)}
	cfg := serve(t, false, &simwsman.Server{Provider: p})
	cfg.MaxEnvelope = 16384
	all, err := wsman.All(open(t, cfg).Enumerate(ctx, "Msvm_VirtualSystemSettingData"))
	if err != nil || len(all) != 40 {
		t.Errorf("in pages: %d, %v", len(all), err)
	}
	p.notes = strings.Repeat("x", 20000)
	if _, err := wsman.All(open(t, cfg).Enumerate(ctx, "Msvm_VirtualSystemSettingData")); !errors.Is(err, wsman.ErrEnvelope) {
		t.Errorf("one that is too large: %v", err)
	}
}

func TestTroubleOfTheSimulator(t *testing.T) {
	for _, tc := range []struct {
		name    string
		trouble simwsman.Trouble
		once    bool
		class   error // nil: the call goes through
	}{
		{"forgets who we are", simwsman.Unauthorized, true, nil},
		{"always forgets", simwsman.Unauthorized, false, fault.ErrDenied},
		{"drops one connection", simwsman.Drop, true, nil},
		{"HTML", simwsman.HTML, false, wsman.ErrProtocol},
		{"restarts", simwsman.Unavailable, false, wsman.ErrBusy},
	} {
		times := 0
		cfg := serve(t, false, &simwsman.Server{Provider: &vms{count: 1}, Fault: func(string) simwsman.Trouble {
			if times++; tc.once && times > 1 {
				return simwsman.None
			}
			return tc.trouble
		}})
		_, err := wsman.All(open(t, cfg).Enumerate(ctx, "Msvm_ComputerSystem"))
		if (err == nil) != (tc.class == nil) || !errors.Is(err, tc.class) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	cfg := serve(t, true, &simwsman.Server{Provider: &vms{count: 1}})
	cfg.Password = secret.New([]byte("wrong"))
	if _, err := wsman.All(open(t, cfg).Enumerate(ctx, "Msvm_ComputerSystem")); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a wrong password: %v", err)
	}
}
