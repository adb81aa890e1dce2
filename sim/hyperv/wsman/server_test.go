package wsman_test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/ntlm"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

const (
	user     = "Administrator"
	password = "Pässw0rd & <more>"
	base     = "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/"
)

// A few is a provider of some VMs, with one service.
type few struct {
	vms     int
	notes   string // of each VM's settings
	invoked func(map[string]cim.Value) (map[string]cim.Value, uint32, error)
}

func (p few) Instances(namespace, class string) []*cim.Instance {
	var all []*cim.Instance
	for i := range p.vms {
		guid := fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
		vm := cim.New(cim.Virtualization, "Msvm_ComputerSystem").Put("Name", cim.Text(guid)).Put("ElementName", cim.Text(fmt.Sprint("web", i%10))).
			Put("TimeOfLastStateChange", cim.Text("2026-11-22T10:00:00Z"))
		settings := cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData").Put("InstanceID", cim.Text("Microsoft:"+guid)).Put("Notes", cim.List(p.notes, "second")).
			Put("ElementName", cim.Text(`a "b" & <c> \ d`))
		state := cim.New(cim.Virtualization, "Msvm_SettingsDefineState").Put("ManagedElement", cim.To(vm.Ref())).Put("SettingData", cim.To(settings.Ref()))
		all = append(all, vm, settings, state)
	}
	all = append(all, cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotService").Put("SystemName", cim.Text("HOST")))
	var out []*cim.Instance
	for _, i := range all {
		if i.Class.Is(class) && i.Class.Namespace == namespace {
			out = append(out, i)
		}
	}
	return out
}

func (p few) Invoke(ctx context.Context, _ *cim.Instance, _ cim.Method, args map[string]cim.Value) (map[string]cim.Value, uint32, error) {
	if p.invoked == nil {
		<-ctx.Done()
		return nil, 0, nil
	}
	return p.invoked(args)
}

func (p few) Put(old, _ *cim.Instance) error {
	return wsman.NotSupported(old.Class.Name + " is read-only")
}

// start serves s and gives its URL and its certificate's file.
func start(t *testing.T, https bool, s *wsman.Server) (url, certificate string) {
	t.Helper()
	s.Account = ntlm.Account{User: user, Password: password}
	s.Machine, s.Now, s.Log = "HV01", time.Now, t.Logf
	scheme := "http"
	if https {
		cert, hash, err := wsman.SelfSigned("HV01", time.Now(), time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		scheme = "https"
		s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
		s.Certificate = hash
		certificate = filepath.Join(t.TempDir(), "cert.pem")
		if err := os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Logf("fingerprint %s", hex.EncodeToString(hash))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return fmt.Sprintf("%s://%s/wsman", scheme, l.Addr()), certificate
}

// message is an envelope; r may hold further headers.
func message(action, uri, selectors, headers, body string) string {
	set := ""
	for _, s := range strings.Fields(selectors) {
		k, v, _ := strings.Cut(s, "=")
		set += fmt.Sprintf(`<w:Selector Name="%s">%s</w:Selector>`, k, v)
	}
	if set != "" {
		set = "<w:SelectorSet>" + set + "</w:SelectorSet>"
	}
	return `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:n="http://schemas.xmlsoap.org/ws/2004/09/enumeration"><s:Header>` +
		`<a:Action s:mustUnderstand="true">` + action + `</a:Action><a:To>x</a:To><a:MessageID>uuid:1</a:MessageID><a:ReplyTo><a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address></a:ReplyTo>` +
		`<w:ResourceURI s:mustUnderstand="true">` + uri + `</w:ResourceURI>` + set + headers + `</s:Header><s:Body>` + body + `</s:Body></s:Envelope>`
}

// basic posts envelopes over HTTPS with Basic.
func basic(t *testing.T, url string) func(envelope string) (int, string) {
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // the test's own server
	t.Cleanup(c.CloseIdleConnections)
	return func(envelope string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(http.MethodPost, url, strings.NewReader(envelope))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(user, password)
		req.Header.Set("Content-Type", "application/soap+xml;charset=UTF-8")
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		p, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(p)
	}
}

const (
	transfer  = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
	enumerate = "http://schemas.xmlsoap.org/ws/2004/09/enumeration"
)

func query(wql string) string {
	return `<n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>100</w:MaxElements><w:Filter Dialect="http://schemas.microsoft.com/wbem/wsman/1/WQL">` + wql + `</w:Filter></n:Enumerate>`
}

// What a host refuses, it refuses by a fault whose subcode and text a client
// can act on.
func TestAHostIsStrict(t *testing.T) {
	const guid = "00000000-0000-0000-0000-000000000003"
	url, _ := start(t, true, &wsman.Server{Basic: true, Provider: few{vms: 5, invoked: func(map[string]cim.Value) (map[string]cim.Value, uint32, error) {
		return map[string]cim.Value{"Job": cim.To(cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_ConcreteJob", Keys: map[string]string{"InstanceID": "J"}})}, 4096, nil
	}}})
	post := basic(t, url)
	const service = base + "Msvm_VirtualSystemSnapshotService"
	create := func(inner string) string {
		return message(service+"/CreateSnapshot", service, "CreationClassName=Msvm_VirtualSystemSnapshotService", "", `<p:CreateSnapshot_INPUT xmlns:p="`+service+`">`+inner+`</p:CreateSnapshot_INPUT>`)
	}
	epr := `<a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address><a:ReferenceParameters><w:ResourceURI>` + base + `Msvm_ComputerSystem</w:ResourceURI><w:SelectorSet><w:Selector Name="CreationClassName">Msvm_ComputerSystem</w:Selector><w:Selector Name="Name">` + guid + `</w:Selector></w:SelectorSet></a:ReferenceParameters>`
	vm := "CreationClassName=Msvm_ComputerSystem Name=" + guid
	for _, test := range []struct {
		name, envelope string
		status         int
		want           string
	}{
		{"get by all keys", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "", ""), 200, "<p:Name>" + guid + "</p:Name>"},
		{"every answer relates to its request", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "", ""), 200, "<a:RelatesTo>uuid:1</a:RelatesTo>"},
		{"NULL is nil", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "", ""), 200, `<p:InstallDate xsi:nil="true"/>`},
		{"times are CIM's", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "", ""), 200, `<p:TimeOfLastStateChange><cim:Datetime>2026-11-22T10:00:00Z</cim:Datetime>`},
		{"get by one of two keys", message(transfer+"/Get", base+"Msvm_ComputerSystem", "Name="+guid, "", ""), 500, "w:InvalidSelectors"},
		{"get what is not there", message(transfer+"/Get", base+"Msvm_ComputerSystem", "CreationClassName=Msvm_ComputerSystem Name=no", "", ""), 500, "w:InvalidSelectors"},
		{"get by what is no key", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm+" ElementName=web3", "", ""), 500, "w:InvalidSelectors"},
		{"a namespace among the selectors", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm+" __cimnamespace=root/virtualization/v2", "", ""), 500, "w:InvalidSelectors"},
		{"a service by its class alone", message(transfer+"/Get", service, "CreationClassName=Msvm_VirtualSystemSnapshotService", "", ""), 200, "<p:Name>vssnapsvc</p:Name>"},
		{"an unknown class", message(transfer+"/Get", base+"Msvm_Nothing", vm, "", ""), 500, "a:DestinationUnreachable"},
		{"another resource", message(transfer+"/Get", "http://schemas.microsoft.com/wbem/wsman/1/windows/shell/cmd", "", "", ""), 500, "InvalidResourceURI"},
		{"a header that must be understood", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, `<w:Future s:mustUnderstand="true"/>`, ""), 500, "s:MustUnderstand"},
		{"an envelope size that nothing fits in", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "<w:MaxEnvelopeSize>4096</w:MaxEnvelopeSize>", ""), 500, "w:EncodingLimit"},
		{"a timeout that is none", message(transfer+"/Get", base+"Msvm_ComputerSystem", vm, "<w:OperationTimeout>60</w:OperationTimeout>", ""), 500, "InvalidMessageInformationHeader"},
		{"put", message(transfer+"/Put", base+"Msvm_ComputerSystem", vm, "", `<p:Msvm_ComputerSystem xmlns:p="`+base+`Msvm_ComputerSystem"><p:ElementName>x</p:ElementName></p:Msvm_ComputerSystem>`), 500, "w:UnsupportedFeature"},
		{"put of a wrong type", message(transfer+"/Put", base+"Msvm_ComputerSystem", vm, "", `<p:Msvm_ComputerSystem xmlns:p="`+base+`Msvm_ComputerSystem"><p:EnabledState>on</p:EnabledState></p:Msvm_ComputerSystem>`), 500, "w:SchemaValidationError"},

		{"a query on the star", message(enumerate+"/Enumerate", base+"*", "", "", query("SELECT * FROM Msvm_ComputerSystem WHERE ElementName='web3'")), 200, "<p:Name>" + guid + "</p:Name>"},
		{"a query on the class", message(enumerate+"/Enumerate", base+"Msvm_ComputerSystem", "", "", query("SELECT * FROM Msvm_ComputerSystem")), 500, "n:CannotProcessFilter"},
		{"a query for a reference", message(enumerate+"/Enumerate", base+"*", "", "", query("SELECT * FROM Msvm_SettingsDefineState WHERE ManagedElement='x'")), 500, "n:CannotProcessFilter"},
		{"a query for what is not there", message(enumerate+"/Enumerate", base+"*", "", "", query("SELECT * FROM Msvm_ComputerSystem WHERE Colour='red'")), 500, "n:CannotProcessFilter"},
		{"a query with another sign", message(enumerate+"/Enumerate", base+"*", "", "", query("SELECT * FROM Msvm_ComputerSystem WHERE ElementName LIKE 'web%'")), 500, "n:CannotProcessFilter"},
		{"another dialect", message(enumerate+"/Enumerate", base+"*", "", "", strings.Replace(query("x"), "/1/WQL", "/1/XPath", 1)), 500, "n:FilterDialectRequestedUnavailable"},
		{"columns", message(enumerate+"/Enumerate", base+"*", "", "", query("SELECT Name FROM Msvm_ComputerSystem WHERE Name='"+guid+"'")), 200, "<p:Name>" + guid + "</p:Name></w:XmlFragment>"},
		{"associators", message(enumerate+"/Enumerate", base+"*", "", "", query(`ASSOCIATORS OF {Msvm_ComputerSystem.CreationClassName='Msvm_ComputerSystem',Name='`+guid+`'} WHERE AssocClass = Msvm_SettingsDefineState ResultClass=Msvm_VirtualSystemSettingData`)), 200, "<p:InstanceID>Microsoft:" + guid},
		{"associators of an unknown class", message(enumerate+"/Enumerate", base+"*", "", "", query(`ASSOCIATORS OF {Msvm_ComputerSystem.Name='x'} WHERE AssocClass=Msvm_Nothing`)), 500, "n:CannotProcessFilter"},
		{"signs in texts", message(enumerate+"/Enumerate", base+"*", "", "", query(`SELECT * FROM Msvm_VirtualSystemSettingData WHERE ElementName='a "b" &amp; &lt;c&gt; \\ d' AND InstanceID='Microsoft:`+guid+`'`)), 200, `&amp; &lt;c&gt; \ d</p:ElementName>`},
		{"references", message(enumerate+"/Enumerate", base+"Msvm_SettingsDefineState", "", "", "<n:Enumerate><w:OptimizeEnumeration/><w:EnumerationMode>EnumerateEPR</w:EnumerationMode></n:Enumerate>"), 200, "<a:EndpointReference>"},
		{"one item, if no number is named", message(enumerate+"/Enumerate", base+"Msvm_ComputerSystem", "", "", "<n:Enumerate><w:OptimizeEnumeration/></n:Enumerate>"), 200, "<n:EnumerationContext>uuid:"},
		{"a context that is unknown", message(enumerate+"/Pull", base+"Msvm_ComputerSystem", "", "", "<n:Pull><n:EnumerationContext>uuid:x</n:EnumerationContext></n:Pull>"), 500, "n:InvalidEnumerationContext"},

		{"a job", create("<p:AffectedSystem>" + epr + "</p:AffectedSystem><p:SnapshotSettings></p:SnapshotSettings><p:SnapshotType>32768</p:SnapshotType>"), 200, "<p:ReturnValue>4096</p:ReturnValue>"},
		{"the job's reference", create("<p:AffectedSystem>" + epr + "</p:AffectedSystem>"), 200, `Msvm_ConcreteJob</w:ResourceURI><w:SelectorSet><w:Selector Name="InstanceID">J</w:Selector>`},
		{"what results is not known yet", create("<p:AffectedSystem>" + epr + "</p:AffectedSystem>"), 200, `<p:ResultingSnapshot xsi:nil="true"/>`},
		{"a reference in a wrapper", create("<p:AffectedSystem><a:EndpointReference>" + epr + "</a:EndpointReference></p:AffectedSystem>"), 500, "w:SchemaValidationError"},
		{"an embedded instance as elements", create("<p:SnapshotSettings><p:Msvm_VirtualSystemSnapshotSettingData/></p:SnapshotSettings>"), 500, "w:SchemaValidationError"},
		{"an unknown parameter", create("<p:Colour>red</p:Colour>"), 500, "w:SchemaValidationError"},
		{"a number that is too large", create("<p:SnapshotType>65536</p:SnapshotType>"), 500, "w:SchemaValidationError"},
		{"an out parameter", create("<p:Job>" + epr + "</p:Job>"), 500, "w:SchemaValidationError"},
		{"an unknown method", message(service+"/Explode", service, "CreationClassName=Msvm_VirtualSystemSnapshotService", "", `<p:Explode_INPUT xmlns:p="`+service+`"/>`), 500, "a:ActionNotSupported"},
		{"no XML", "hello", 500, "w:InvalidBody"},
		{"a document type", `<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>`, 500, "w:InvalidBody"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, answer := post(test.envelope)
			if status != test.status || !strings.Contains(answer, test.want) {
				t.Errorf("%d %s, want %d and %q", status, answer, test.status, test.want)
			}
			if status == 500 && !strings.Contains(answer, "<f:WSManFault") {
				t.Errorf("no WSManFault in %s", answer)
			}
		})
	}
}

// An enumeration hands out every item once, in envelopes of the size that the
// client asked for, and an item that is larger than that is a fault.
func TestEnvelopesHaveTheSizeThatWasAskedFor(t *testing.T) {
	url, _ := start(t, true, &wsman.Server{Basic: true, Provider: few{vms: 100, notes: strings.Repeat("n", 1000)}})
	post := basic(t, url)
	const size = 16 << 10
	limit := fmt.Sprintf("<w:MaxEnvelopeSize>%d</w:MaxEnvelopeSize>", size)
	_, answer := post(message(enumerate+"/Enumerate", base+"Msvm_VirtualSystemSettingData", "", limit, "<n:Enumerate/>"))
	seen, pulls := map[string]bool{}, 0
	for !strings.Contains(answer, "<n:EndOfSequence/>") {
		_, rest, _ := strings.Cut(answer, "<n:EnumerationContext>")
		id, _, ok := strings.Cut(rest, "</n:EnumerationContext>")
		if !ok {
			t.Fatal("no context in " + answer)
		}
		var status int
		status, answer = post(message(enumerate+"/Pull", base+"Msvm_VirtualSystemSettingData", "", limit, "<n:Pull><n:EnumerationContext>"+id+"</n:EnumerationContext><n:MaxElements>1000</n:MaxElements></n:Pull>"))
		if status != 200 || len(answer) > size {
			t.Fatalf("%d, %d bytes: %.500s", status, len(answer), answer)
		}
		for _, part := range strings.Split(answer, "<p:InstanceID>")[1:] {
			name, _, _ := strings.Cut(part, "<")
			if seen[name] {
				t.Errorf("%s twice", name)
			}
			seen[name] = true
		}
		pulls++
	}
	if len(seen) != 100 || pulls < 10 {
		t.Errorf("%d items in %d envelopes", len(seen), pulls)
	}

	url, _ = start(t, true, &wsman.Server{Basic: true, Provider: few{vms: 1, notes: strings.Repeat("n", size)}})
	status, answer := basic(t, url)(message(transfer+"/Get", base+"Msvm_VirtualSystemSettingData", "InstanceID=Microsoft:00000000-0000-0000-0000-000000000000", limit, ""))
	if status != 500 || !strings.Contains(answer, "w:EncodingLimit") {
		t.Errorf("%d %.300s", status, answer)
	}
}

func TestAMethodHasTheTimeThatTheClientGives(t *testing.T) {
	url, _ := start(t, true, &wsman.Server{Basic: true, Provider: few{}})
	const service = base + "Msvm_VirtualSystemSnapshotService"
	status, answer := basic(t, url)(message(service+"/DestroySnapshot", service, "CreationClassName=Msvm_VirtualSystemSnapshotService", "<w:OperationTimeout>PT0.1S</w:OperationTimeout>",
		`<p:DestroySnapshot_INPUT xmlns:p="`+service+`"/>`))
	if status != 500 || !strings.Contains(answer, "w:TimedOut") || !strings.Contains(answer, "2150858793") {
		t.Errorf("%d %s", status, answer)
	}
}

func TestWhoIsNotLetIn(t *testing.T) {
	sealed, _ := start(t, false, &wsman.Server{Basic: true, Provider: few{}})
	off, _ := start(t, true, &wsman.Server{Provider: few{}})
	on, _ := start(t, true, &wsman.Server{Basic: true, Provider: few{}})
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // the test's own server
	defer c.CloseIdleConnections()
	get := message(transfer+"/Get", base+"Msvm_ComputerSystem", "Name=x", "", "")
	for _, test := range []struct {
		name, url, authorization string
		offers                   string
	}{
		{"nobody", on, "", "Negotiate, Basic realm=\"WSMAN\""},
		{"Basic with a wrong password", on, "Basic QWRtaW5pc3RyYXRvcjp4", "Negotiate, Basic realm=\"WSMAN\""},
		{"Basic where it is off", off, "Basic QWRtaW5pc3RyYXRvcjpQw6Rzc3cwcmQgJiA8bW9yZT4=", "Negotiate"},
		{"Basic without TLS", sealed, "Basic QWRtaW5pc3RyYXRvcjpQw6Rzc3cwcmQgJiA8bW9yZT4=", "Negotiate"},
		{"no base64", on, "Negotiate !!", "Negotiate, Basic realm=\"WSMAN\""},
		{"an authenticate message first", on, "Negotiate TlRMTVNTUAADAAAA", "Negotiate, Basic realm=\"WSMAN\""},
		{"a scheme that is unknown", on, "Kerberos YQ==", "Negotiate, Basic realm=\"WSMAN\""},
	} {
		t.Run(test.name, func(t *testing.T) {
			req, _ := http.NewRequest(http.MethodPost, test.url, strings.NewReader(get))
			if test.authorization != "" {
				req.Header.Set("Authorization", test.authorization)
			}
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if offers := strings.Join(res.Header.Values("WWW-Authenticate"), ", "); res.StatusCode != 401 || offers != test.offers {
				t.Errorf("%d, %q", res.StatusCode, offers)
			}
		})
	}
}
