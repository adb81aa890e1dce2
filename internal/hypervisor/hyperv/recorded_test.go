package hyperv_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/hypervisor/hyperv/recording"
	"github.com/backstay/backstay/internal/secret"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// What must not be in a recording of the host below.
const (
	secretHost    = "HVKONTOSO07"
	secretCluster = "Kontosoverbund"
	secretNode    = "HVKONTOSO08"
	secretUser    = "svc-sicherung"
	secretWord    = "hunter2-Passwort"
	secretVM      = "Lohnbüro & Söhne <Zürich>"
	secretOther   = "payroll%20db-ŁÓDŹ"
	secretFolder  = "Kunden Müllerhaus"
)

// record makes a recording of a simulated host: the VM that it asks for closely
// and one beside it.
func record(t *testing.T, plain bool) (*recording.Recording, []string) {
	t.Helper()
	cluster := plain // so that both are seen
	shared := t.TempDir()
	node := func(name string) *host.Host {
		h, err := host.New(host.Options{Dir: t.TempDir(), Shared: shared, Name: name, JobTime: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		return h
	}
	h := node(secretHost)
	has := h // the VM
	if cluster {
		has = node(secretNode)
		host.NewCluster(secretCluster, h, has)
	}
	for name, path := range map[string]string{secretVM: `C:\ClusterStorage\Volume1\` + secretFolder + `\Disk of Lohnbuero.vhdx`, secretOther: ""} {
		if _, err := has.AddVM(host.Spec{Name: name, Root: `C:\ClusterStorage\Volume1\` + secretFolder, Disks: []host.DiskSpec{{Path: path, Bytes: 4 << 20}}}); err != nil {
			t.Fatal(err)
		}
	}
	o := sim.Options{User: secretUser, Password: secretWord, HTTP: plain}
	e, err := sim.Serve(h, secretHost, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	at, err := url.Parse(e.URL)
	if err != nil {
		t.Fatal(err)
	}
	source := fmt.Sprintf("hyperv://%s@%s?fingerprint=sha256:%s", secretUser, at.Host, e.Fingerprint)
	if plain {
		source = fmt.Sprintf("hyperv+http://%s@%s?auth=ntlm", secretUser, at.Host)
	}
	if cluster {
		other, err := sim.Serve(has, secretNode, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { other.Close() })
		u, err := url.Parse(other.URL)
		if err != nil {
			t.Fatal(err)
		}
		source += "&node=" + secretNode + "=" + u.Host
	}
	r := &recording.Recorder{}
	before := allNames(h, has)
	a, err := drive(t, source, secretWord, secretVM, []string{hyperv.StepCycle, hyperv.StepRestore}, r, func(d *hyperv.Driver) { hyperv.ReachHost(d, has) })
	if err != nil {
		t.Fatal(err)
	}
	if after := allNames(h, has); !slices.Equal(before, after) {
		t.Errorf("the host has %q, and had %q", after, before)
	}
	a.By = "a test"
	c, err := r.Recording(a, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ids := before
	return c, ids
}

// allNames are the ids of VMs, and of what else hosts have that is as private.
func allNames(hosts ...*host.Host) (ids []string) {
	for _, h := range hosts {
		for _, class := range []string{"Msvm_ComputerSystem", "Msvm_PlannedComputerSystem"} {
			for _, i := range h.Instances("root/virtualization/v2", class) {
				ids = append(ids, i.Get("Name").String())
			}
		}
	}
	return ids
}

// drive asks a host what a recording has, with our own client, whose files reach
// says where to find.
func drive(t *testing.T, source, password, vm string, method []string, r *recording.Recorder, reach func(*hyperv.Driver)) (a recording.About, err error) {
	t.Helper()
	u, _, err := hyperv.ParseSource(source)
	if err != nil {
		t.Fatal(err)
	}
	o := hyperv.Options{Host: u, Password: secret.New([]byte(password)), StateDir: t.TempDir()}
	step := func(string) {}
	if r != nil {
		o.Record, step = r.Record, r.Step
	}
	d, err := hyperv.Open(t.Context(), o)
	if err != nil {
		return a, err
	}
	defer d.Close()
	reach(d)
	a.VM = vm
	if a.OS, err = d.Survey(t.Context(), vm, step); err != nil {
		return a, fmt.Errorf("survey: %w", err)
	}
	if slices.Contains(method, hyperv.StepCycle) {
		if err := d.Rehearse(t.Context(), vm, step); err != nil {
			return a, fmt.Errorf("cycle: %w", err)
		}
	}
	if slices.Contains(method, hyperv.StepRestore) {
		made, err := d.RehearseRestore(t.Context(), vm, func(hyperv.RestorePlan) error { return nil }, step)
		if a.Folder = made.Folder; err != nil {
			return a, fmt.Errorf("restore: %w", err)
		}
	}
	a.Nodes = d.Nodes()
	return a, nil
}

var definitionFile = regexp.MustCompile(`[0-9A-Za-z-]+\.vmcx`)

// replay asks the same of what a recording has, and wants our requests to be
// the recorded ones and our client to understand the answers. Of files, which
// no recording has, there is what its steps needed.
func replay(t *testing.T, c *recording.Recording) {
	t.Helper()
	p := recording.NewPlayer(c)
	srv := httptest.NewTLSServer(p)
	defer srv.Close()
	pin := sha256.Sum256(srv.Certificate().Raw)
	source := fmt.Sprintf("hyperv://anybody@%s?auth=basic&fingerprint=sha256:%x", srv.Listener.Addr(), pin)
	for _, node := range c.Nodes {
		source += fmt.Sprintf("&node=%s=%s", url.QueryEscape(node), srv.Listener.Addr())
	}
	var definitions []string
	if slices.Contains(c.Method, hyperv.StepImport) {
		for _, x := range c.Exchanges {
			definitions = append(definitions, definitionFile.FindAllString(x.Response, -1)...)
		}
		slices.Sort(definitions)
		definitions = slices.Compact(definitions)
	}
	a, err := drive(t, source, "anything", c.VM, c.Method, nil, func(d *hyperv.Driver) { hyperv.ReachStandIn(d, t.TempDir(), c.Folder, definitions) })
	switch {
	case c.Failed: // what is asked until then is all that there is to see
	case err != nil:
		t.Errorf("replay: %v", err)
	case a.OS != c.OS:
		t.Errorf("the host's version is %q, and was %q", a.OS, c.OS)
	}
	if err := p.Err(); err != nil {
		t.Errorf("replay: %v", err)
	}
}

// Recordings of real hosts, as their owners sent them, answer our client as the
// hosts did. While there is none, one of the simulator shows that this works;
// it proves nothing about hosts, and is not kept.
func TestRecordings(t *testing.T) {
	files, err := filepath.Glob("testdata/recorded/*.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d recordings of real hosts", len(files))
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			f, err := os.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c, err := recording.Read(f)
			if err != nil {
				t.Fatal(err)
			}
			replay(t, c)
		})
	}
}

func TestARecordingIsReplayedAndNamesNobody(t *testing.T) {
	for name, plain := range map[string]bool{"HTTPS": false, "sealed HTTP": true} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && plain {
				t.Skip("the same once more, sealed")
			}
			c, ids := record(t, plain)
			if c.LeftOut > 0 || c.Unanswered > 0 || len(c.Exchanges) < 40 || c.OS != "10.0.20348" {
				t.Errorf("%+v with %d exchanges", c.Header, len(c.Exchanges))
			}
			var out bytes.Buffer
			if err := c.Write(&out); err != nil {
				t.Fatal(err)
			}
			hunt(t, out.String(), append(ids, secretHost, secretNode, secretCluster, secretUser, secretWord, secretVM, secretOther, secretFolder, "Lohnbuero")...)
			for _, want := range []string{"CreateSnapshot", "ConvertToReferencePoint", "DestroySnapshot", "DestroyReferencePoint", "DefineSystem", "ImportSystemDefinition", "RealizePlannedSystem", "ModifyResourceSettings", "Microsoft:Hyper-V:Snapshot:Recovery", ".avhdx", "4194304"} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%s was taken out, and tells nothing of anybody", want)
				}
			}
			again, err := recording.Read(bytes.NewReader(out.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			replay(t, again)
			again.Failed, again.Exchanges = true, again.Exchanges[:len(again.Exchanges)/2]
			replay(t, again) // one that ends in the middle
			refuseOthers(t, c)
		})
	}
}

// refuseOthers sees that a client that asks something else than was recorded
// does not get by.
func refuseOthers(t *testing.T, c *recording.Recording) {
	t.Helper()
	for name, change := range map[string]func(x *recording.Exchange){
		"another value": func(x *recording.Exchange) { x.Request = strings.Replace(x.Request, ">1000<", ">1001<", 1) },
		"another class": func(x *recording.Exchange) { x.Request = strings.Replace(x.Request, "Msvm_", "Msvx_", 1) },
		"an element more": func(x *recording.Exchange) {
			x.Request = strings.Replace(x.Request, "</s:Header>", "<a:To/></s:Header>", 1)
		},
	} {
		other := *c
		other.Exchanges = slices.Clone(c.Exchanges)
		change(&other.Exchanges[0])
		p := recording.NewPlayer(&other)
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest("POST", "/wsman", strings.NewReader(c.Exchanges[0].Request)))
		if err := p.Err(); w.Code == 200 || err == nil {
			t.Errorf("%s: %d, %v", name, w.Code, err)
		}
	}
	if err := recording.NewPlayer(c).Err(); err == nil {
		t.Error("a client that asked nothing did all")
	}
}

// hunt looks for what must not be there, in whatever form it may hide.
func hunt(t *testing.T, text string, secrets ...string) {
	t.Helper()
	var plain strings.Builder // what the lines say once JSON and XML are read
	plain.WriteString(text)
	for line := range strings.Lines(text) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		for _, x := range v {
			s := fmt.Sprint(x)
			plain.WriteString("\n" + s)
			d := xml.NewDecoder(strings.NewReader(s))
			for tok, err := d.Token(); err == nil; tok, err = d.Token() {
				if c, ok := tok.(xml.CharData); ok {
					plain.WriteString("\n" + string(c))
				}
			}
		}
	}
	all := strings.ToLower(plain.String())
	if un, err := url.PathUnescape(all); err == nil {
		all += un
	}
	bare := onlyLetters(all)
	for _, s := range secrets {
		for what, form := range forms(s) {
			if strings.Contains(all, strings.ToLower(form)) {
				t.Errorf("%q is in it, %s", s, what)
			}
		}
		for _, word := range strings.FieldsFunc(s, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
			if len(word) >= 4 && !foundByChance(word) && strings.Contains(all, strings.ToLower(word)) {
				t.Errorf("%q of %q is in it", word, s)
			}
		}
		if b := onlyLetters(strings.ToLower(s)); len(b) > 5 && strings.Contains(bare, b) {
			t.Errorf("%q is in it, in pieces", s)
		}
	}
}

// foundByChance tells whether random digits have word among them now and then,
// as a recording's pseudonyms and hashes do: four that are all hexadecimal stand
// in some thousand of them once in twenty runs. The first and the
// last piece of an identifier have eight and twelve: these are looked for.
func foundByChance(word string) bool {
	return len(word) < 8 && strings.Trim(word, "0123456789abcdefABCDEF") == ""
}

func onlyLetters(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) {
			return r
		}
		return -1
	}, s)
}

// forms are the ways in which s may be written.
func forms(s string) map[string]string {
	var escaped bytes.Buffer
	xml.EscapeText(&escaped, []byte(s))
	var wide []byte
	for _, u := range utf16.Encode([]rune(s)) {
		wide = append(wide, byte(u), byte(u>>8))
	}
	quoted, _ := json.Marshal(s)
	out := map[string]string{"as it is": s, "escaped for XML": escaped.String(), "escaped for a URL": url.PathEscape(s), "as a query": url.QueryEscape(s),
		"as JSON": strings.Trim(string(quoted), `"`), "in hexadecimal": hex.EncodeToString([]byte(s)), "as UTF-16 in hexadecimal": hex.EncodeToString(wide)}
	for name, p := range map[string][]byte{"base64": []byte(s), "base64 of UTF-16": wide} {
		for at := range 3 {
			// What of the encoding does not depend on what stands around it.
			enc := base64.RawStdEncoding.EncodeToString(append(make([]byte, at), p...))
			if from, to := at+1, len(enc)-2; to-from > 6 {
				out[fmt.Sprintf("%s at %d", name, at)] = enc[from:to]
			}
		}
	}
	return out
}
