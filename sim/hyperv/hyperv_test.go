package hyperv_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/wsman"
	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
	sim "github.com/backstay/backstay/sim/hyperv/wsman"
)

// serve starts a host with one VM and gives our client of it.
func serve(t *testing.T, o hyperv.Options, change func(*wsman.Config)) (*host.Host, *wsman.Client) {
	t.Helper()
	h, err := host.New(host.Options{Dir: t.TempDir(), JobTime: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	if _, err := h.AddVM(host.Spec{Name: "web01", ID: "0A7D4F1C-6B1E-4C55-9B1A-0C51AD6F0001", Disks: []host.DiskSpec{{Bytes: 64 << 20}}}); err != nil {
		t.Fatal(err)
	}
	o.User, o.Password, o.Log = "Administrator", "Pässw0rd", t.Logf
	e, err := hyperv.Serve(h, "HV01", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(e.Close(), e.Close()); err != nil {
			t.Error(err)
		}
	})
	cfg := wsman.Config{URL: e.URL, User: "Administrator", Password: secret.New([]byte("Pässw0rd")), Timeout: time.Minute}
	if e.Fingerprint != "" {
		pin, err := wsman.ParseFingerprint(e.Fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Pin = &pin
	}
	if change != nil {
		change(&cfg)
	}
	c, err := wsman.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return h, c
}

var service = wsman.NewRef("Msvm_VirtualSystemSnapshotService", "CreationClassName", "Msvm_VirtualSystemSnapshotService")

// Our client and the simulator, which share no code, agree on a whole backup's
// calls, by each way to sign in.
func TestOurClientAndTheSimulatorAgree(t *testing.T) {
	for _, test := range []struct {
		name   string
		o      hyperv.Options
		change func(*wsman.Config)
	}{
		{"NTLM over HTTPS, bound to the certificate", hyperv.Options{RequireBinding: true, NoBasic: true}, nil},
		{"sealed", hyperv.Options{HTTP: true}, nil},
		{"Basic", hyperv.Options{}, func(c *wsman.Config) { c.Auth = wsman.Basic }},
	} {
		if testing.Short() && !test.o.HTTP {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			h, c := serve(t, test.o, test.change)
			ctx := t.Context()
			vms, err := wsman.All(c.Query(ctx, "SELECT * FROM Msvm_ComputerSystem WHERE Caption='Virtual Machine' AND ElementName="+wsman.Quote("web01")))
			if err != nil || len(vms) != 1 {
				t.Fatal(vms, err)
			}
			id, err := wsman.Prop[string](vms[0], "Name")
			if err != nil {
				t.Fatal(err)
			}
			vm := wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", id)
			var since string
			for round := range 2 {
				if err := h.Write("web01", 0, int64(round)<<20, 1<<20, 5); err != nil {
					t.Fatal(err)
				}
				settings := wsman.NewInstance("Msvm_VirtualSystemSnapshotSettingData").Set("ConsistencyLevel", wsman.Of(uint8(1))).Set("GuestBackupType", wsman.Of(uint8(2))).Set("IgnoreNonSnapshottableDisks", wsman.Of(true))
				made := job(t, c, "CreateSnapshot", wsman.Arg("AffectedSystem", wsman.Of(vm)), wsman.Arg("SnapshotSettings", wsman.Of(settings)), wsman.Arg("SnapshotType", wsman.Of(uint16(32768))))
				disks, err := wsman.All(c.Query(ctx, fmt.Sprintf("ASSOCIATORS OF {%s} WHERE AssocClass=Msvm_VirtualSystemSettingDataComponent ResultClass=Msvm_StorageAllocationSettingData", path(made))))
				if err != nil || len(disks) != 1 {
					t.Fatal(disks, err)
				}
				files, err := wsman.Props[string](disks[0], "HostResource")
				if err != nil || len(files) != 1 {
					t.Fatal(files, err)
				}
				if since != "" {
					out, err := c.Invoke(ctx, wsman.NewRef("Msvm_ImageManagementService", "CreationClassName", "Msvm_ImageManagementService"), "GetVirtualDiskChanges",
						wsman.Arg("Path", wsman.Of(files[0])), wsman.Arg("LimitId", wsman.Of(since)), wsman.Arg("TargetSnapshotId", wsman.Of("")), wsman.Arg("ByteOffset", wsman.Of(uint64(0))), wsman.Arg("ByteLength", wsman.Of(uint64(64<<20))))
					if err != nil {
						t.Fatal(err)
					}
					offsets, _ := wsman.Props[uint64](out, "ChangedByteOffsets")
					lengths, _ := wsman.Props[uint64](out, "ChangedByteLengths")
					if len(offsets) != 1 || offsets[0] != 1<<20 || len(lengths) != 1 || lengths[0] != 1<<20 {
						t.Errorf("changes %v %v", offsets, lengths)
					}
				}
				point, err := c.Get(ctx, job(t, c, "ConvertToReferencePoint", wsman.Arg("AffectedSnapshot", wsman.Of(made)), wsman.Arg("ReferencePointSettings", wsman.Of(""))))
				if err != nil {
					t.Fatal(err)
				}
				ids, err := wsman.Props[string](point, "ResilientChangeTrackingIdentifiers")
				if err != nil || len(ids) != 1 {
					t.Fatal(ids, err)
				}
				since = ids[0]
			}
			if _, err := c.Get(ctx, wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", "no")); !errors.Is(err, fault.ErrNotFound) {
				t.Errorf("a VM that is not there: %v", err)
			}
		})
	}
}

func path(r wsman.Ref) string {
	s := r.String()
	return s[strings.LastIndex(s[:strings.IndexByte(s, '.')], ":")+1:]
}

// job calls a method of the snapshot service and gives what its job created.
func job(t *testing.T, c *wsman.Client, method string, args ...wsman.Argument) wsman.Ref {
	t.Helper()
	out, err := c.Invoke(t.Context(), service, method, args...)
	if err != nil {
		t.Fatal(err)
	}
	if code, err := wsman.Prop[uint32](out, "ReturnValue"); err != nil || code != 4096 {
		t.Fatal(method, code, err)
	}
	ref, err := wsman.Prop[wsman.Ref](out, "Job")
	if err != nil {
		t.Fatal(err)
	}
	for {
		j, err := c.Get(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		state, err := wsman.Prop[uint16](j, "JobState")
		if err != nil {
			t.Fatal(err)
		}
		if state == 7 {
			break
		}
		if state > 7 {
			text, _ := wsman.PropOr(j, "ErrorDescription", "")
			t.Fatal(method, state, text)
		}
		time.Sleep(5 * time.Millisecond)
	}
	rows, err := wsman.All(c.Enumerate(t.Context(), "Msvm_AffectedJobElement"))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		by, err := wsman.Prop[wsman.Ref](row, "AffectingElement")
		if err != nil {
			t.Fatal(err)
		}
		effects, err := wsman.Props[uint16](row, "ElementEffects")
		if err != nil {
			t.Fatal(err)
		}
		if by.Keys[0].Value == ref.Keys[0].Value && len(effects) == 1 && effects[0] == 5 {
			made, err := wsman.Prop[wsman.Ref](row, "AffectedElement")
			if err != nil {
				t.Fatal(err)
			}
			return made
		}
	}
	t.Fatalf("%s created nothing", method)
	return wsman.Ref{}
}

// Each way in which a host or what is before it can fail is an error that says
// so, and the client goes on afterwards.
func TestWhatGoesWrongOnTheWay(t *testing.T) {
	for _, test := range []struct {
		name    string
		trouble sim.Trouble
		want    func(error) bool
	}{
		{"the connection is dropped", sim.Drop, func(err error) bool { var c *wsman.ConnectionError; return errors.As(err, &c) }},
		{"a page of a proxy", sim.HTML, func(err error) bool { return errors.Is(err, wsman.ErrProtocol) }},
		{"the service restarts", sim.Unavailable, func(err error) bool { return errors.Is(err, wsman.ErrBusy) }},
		{"401 in the middle", sim.Unauthorized, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			left := make(chan sim.Trouble, 1)
			_, c := serve(t, hyperv.Options{Fault: func(action string) sim.Trouble {
				select {
				case x := <-left:
					return x
				default:
					return sim.None
				}
			}}, nil)
			invoke := func() error {
				_, err := c.Invoke(t.Context(), wsman.NewRef("Msvm_ImageManagementService", "CreationClassName", "Msvm_ImageManagementService"), "GetVirtualHardDiskState", wsman.Arg("Path", wsman.Of(`C:\no`)))
				return err
			}
			if err := invoke(); err != nil {
				t.Fatal(err)
			}
			left <- test.trouble
			err := invoke()
			t.Log(err)
			if test.want != nil && !test.want(err) {
				t.Errorf("the error is %v", err)
			}
			if err := invoke(); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestWhoIsRefused(t *testing.T) {
	_, c := serve(t, hyperv.Options{}, func(c *wsman.Config) { c.Password = secret.New([]byte("wrong")) })
	if _, err := wsman.All(c.Enumerate(t.Context(), "Msvm_ComputerSystem")); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a wrong password: %v", err)
	}
	_, c = serve(t, hyperv.Options{Expired: true}, func(c *wsman.Config) { c.Pin = nil })
	var cert *wsman.CertificateError
	if _, err := wsman.All(c.Enumerate(context.Background(), "Msvm_ComputerSystem")); !errors.As(err, &cert) {
		t.Errorf("a certificate that nobody vouches for: %v", err)
	}
}

func TestAnAnswerThatIsTooLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("makes checkpoints as others do")
	}
	h, c := serve(t, hyperv.Options{}, func(c *wsman.Config) { c.MaxEnvelope = 32 << 10 })
	vm := wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", "0A7D4F1C-6B1E-4C55-9B1A-0C51AD6F0001")
	convert := func() string {
		made := job(t, c, "CreateSnapshot", wsman.Arg("AffectedSystem", wsman.Of(vm)), wsman.Arg("SnapshotType", wsman.Of(uint16(32768))))
		point, err := c.Get(t.Context(), job(t, c, "ConvertToReferencePoint", wsman.Arg("AffectedSnapshot", wsman.Of(made))))
		if err != nil {
			t.Fatal(err)
		}
		ids, _ := wsman.Props[string](point, "ResilientChangeTrackingIdentifiers")
		return ids[0]
	}
	id := convert()
	for off := int64(0); off < 64<<20; off += 128 << 10 {
		if err := h.Write("web01", 0, off, 4096, 3); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(length uint64) error {
		_, err := c.Invoke(t.Context(), wsman.NewRef("Msvm_ImageManagementService", "CreationClassName", "Msvm_ImageManagementService"), "GetVirtualDiskChanges",
			wsman.Arg("Path", wsman.Of(`C:\VMs\web01\Virtual Hard Disks\web01-0.vhdx`)), wsman.Arg("LimitId", wsman.Of(id)), wsman.Arg("ByteOffset", wsman.Of(uint64(0))), wsman.Arg("ByteLength", wsman.Of(length)))
		return err
	}
	if err := ask(64 << 20); !errors.Is(err, wsman.ErrEnvelope) {
		t.Errorf("all at once: %v", err)
	}
	if err := ask(8 << 20); err != nil {
		t.Errorf("an eighth: %v", err)
	}
}
