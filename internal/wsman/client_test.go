package wsman

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
)

var ctx = context.Background()

var vssService = NewRef("Msvm_VirtualSystemSnapshotService", "CreationClassName", "Msvm_VirtualSystemSnapshotService")

// Every kind of request, to the byte: what a host got is what it has to be.
func TestRequestsToTheByte(t *testing.T) {
	const head = `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:n="http://schemas.xmlsoap.org/ws/2004/09/enumeration" xmlns:cim="http://schemas.dmtf.org/wbem/wscim/1/common" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><s:Header><a:Action s:mustUnderstand="true">@ACTION</a:Action><w:ResourceURI s:mustUnderstand="true">@RESOURCE</w:ResourceURI><a:To s:mustUnderstand="true">@URL/wsman</a:To><a:MessageID s:mustUnderstand="true">@ID</a:MessageID><a:ReplyTo><a:Address s:mustUnderstand="true">http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address></a:ReplyTo><w:MaxEnvelopeSize s:mustUnderstand="true">512000</w:MaxEnvelopeSize><w:OperationTimeout>PT60S</w:OperationTimeout><w:Locale s:mustUnderstand="false" xml:lang="en-US"/>`
	const foot = `</s:Body></s:Envelope>`
	const selectVM = `<w:SelectorSet><w:Selector Name="CreationClassName">Msvm_ComputerSystem</w:Selector><w:Selector Name="Name">A&amp;B</w:Selector></w:SelectorSet>`
	vmRef := NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", "A&B")
	xfer, enum := "http://schemas.xmlsoap.org/ws/2004/09/transfer/", "http://schemas.xmlsoap.org/ws/2004/09/enumeration/"

	for _, tc := range []struct {
		name             string
		do               func(c *Client) error
		action, resource string
		rest             string // after the fixed part of the header
		answer           string
	}{
		{"get", func(c *Client) error { _, err := c.Get(ctx, vmRef); return err },
			xfer + "Get", r2 + "Msvm_ComputerSystem", selectVM + `</s:Header><s:Body>`, vm("A&amp;B")},
		{"get of another namespace by the class's one instance", func(c *Client) error {
			_, err := c.Get(ctx, Ref{Namespace: "root/cimv2", Class: "Win32_OperatingSystem"})
			return err
		}, xfer + "Get", "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/cimv2/Win32_OperatingSystem", `</s:Header><s:Body>`, vm("x")},
		{"put", func(c *Client) error {
			_, err := c.Put(ctx, vmRef, NewInstance("Msvm_ComputerSystem").Set("ElementName", Of("<web>")).Set("Notes", List("a", "b")).Set("Owner", Null()).
				Set("Since", Of(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))).Set("Delay", Of(26*time.Hour+1500*time.Millisecond)))
			return err
		}, xfer + "Put", r2 + "Msvm_ComputerSystem", selectVM + `</s:Header><s:Body><p:Msvm_ComputerSystem xmlns:p="` + r2 + `Msvm_ComputerSystem"><p:ElementName>&lt;web&gt;</p:ElementName><p:Notes>a</p:Notes><p:Notes>b</p:Notes><p:Owner xsi:nil="true"/><p:Since><cim:Datetime>2026-01-02T03:04:05Z</cim:Datetime></p:Since><p:Delay><cim:Interval>P1DT7201.5S</cim:Interval></p:Delay></p:Msvm_ComputerSystem>`, ""},
		{"enumerate", func(c *Client) error { _, err := All(c.Enumerate(ctx, "Msvm_ComputerSystem")); return err },
			enum + "Enumerate", r2 + "Msvm_ComputerSystem", `</s:Header><s:Body><n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>1000</w:MaxElements></n:Enumerate>`,
			`<wsen:EnumerateResponse><wsman:EndOfSequence/></wsen:EnumerateResponse>`},
		{"enumerate references", func(c *Client) error { _, err := All(c.EnumerateRefs(ctx, "Msvm_ComputerSystem")); return err },
			enum + "Enumerate", r2 + "Msvm_ComputerSystem", `</s:Header><s:Body><n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>1000</w:MaxElements><w:EnumerationMode>EnumerateEPR</w:EnumerationMode></n:Enumerate>`,
			`<wsen:EnumerateResponse><wsman:EndOfSequence/></wsen:EnumerateResponse>`},
		{"query", func(c *Client) error {
			_, err := All(c.Query(ctx, "SELECT * FROM Msvm_ComputerSystem WHERE ElementName="+Quote(`a\'b`)))
			return err
		},
			enum + "Enumerate", r2 + "*", `</s:Header><s:Body><n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>1000</w:MaxElements><w:Filter Dialect="http://schemas.microsoft.com/wbem/wsman/1/WQL">SELECT * FROM Msvm_ComputerSystem WHERE ElementName=&#39;a\\\&#39;b&#39;</w:Filter></n:Enumerate>`,
			`<wsen:EnumerateResponse><wsman:EndOfSequence/></wsen:EnumerateResponse>`},
		{"invoke", func(c *Client) error {
			_, err := c.Invoke(ctx, vssService, "CreateSnapshot", Arg("AffectedSystem", Of(vmRef)),
				Arg("SnapshotSettings", Of(NewInstance("Msvm_VirtualSystemSnapshotSettingData").Set("ConsistencyLevel", Of(uint8(1))).Set("ElementName", Of("]]>")))),
				Arg("SnapshotType", Of(uint16(32768))), Arg("Force", Of(true)), Arg("None", List[string]()))
			return err
		}, r2 + "Msvm_VirtualSystemSnapshotService/CreateSnapshot", r2 + "Msvm_VirtualSystemSnapshotService",
			`<w:SelectorSet><w:Selector Name="CreationClassName">Msvm_VirtualSystemSnapshotService</w:Selector></w:SelectorSet></s:Header><s:Body><p:CreateSnapshot_INPUT xmlns:p="` + r2 + `Msvm_VirtualSystemSnapshotService">` +
				`<p:AffectedSystem><a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address><a:ReferenceParameters><w:ResourceURI>` + r2 + `Msvm_ComputerSystem</w:ResourceURI>` + selectVM + `</a:ReferenceParameters></p:AffectedSystem>` +
				`<p:SnapshotSettings><![CDATA[<INSTANCE CLASSNAME="Msvm_VirtualSystemSnapshotSettingData"><PROPERTY NAME="ConsistencyLevel" TYPE="uint8"><VALUE>1</VALUE></PROPERTY><PROPERTY NAME="ElementName" TYPE="string"><VALUE>]]&gt;</VALUE></PROPERTY></INSTANCE>]]></p:SnapshotSettings><p:SnapshotType>32768</p:SnapshotType><p:Force>true</p:Force></p:CreateSnapshot_INPUT>`,
			`<y:CreateSnapshot_OUTPUT xmlns:y="` + r2 + `Msvm_VirtualSystemSnapshotService"><y:ReturnValue>0</y:ReturnValue></y:CreateSnapshot_OUTPUT>`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, tls := range ways() {
				var got *asked
				h := newHost(t, tls, func(_ *host, a *asked) reply { got = a; return soap(a, tc.answer) })
				if err := tc.do(h.client()); err != nil {
					t.Fatal(err)
				}
				want := strings.NewReplacer("@ACTION", tc.action, "@RESOURCE", tc.resource, "@URL", h.srv.URL, "@ID", got.id).Replace(head) + tc.rest + foot
				if got.envelope != want {
					same := 0
					for same < min(len(want), len(got.envelope)) && want[same] == got.envelope[same] {
						same++
					}
					t.Errorf("tls %v: after %d bytes sent\n%s\nnot\n%s", tls, same, got.envelope[same:], want[same:])
				}
				if !strings.HasPrefix(got.id, "uuid:") || len(got.id) != 41 {
					t.Errorf("id %q", got.id)
				}
			}
		})
	}
}

// pages answers an enumeration in pages of one each.
func pages(names ...string) func(*host, *asked) reply {
	left := names
	return func(h *host, a *asked) reply {
		switch a.method {
		case "Enumerate":
			left = names
			return soap(a, `<wsen:EnumerateResponse><wsen:EnumerationContext>uuid:ctx&amp;0</wsen:EnumerationContext><wsman:Items/></wsen:EnumerateResponse>`)
		case "Pull":
			if want := fmt.Sprintf("uuid:ctx&amp;%d", len(names)-len(left)); !strings.Contains(a.envelope, "<n:Pull><n:EnumerationContext>"+want+"</n:EnumerationContext><n:MaxElements>1000</n:MaxElements></n:Pull>") {
				h.problem("pull without %s: %s", want, a.envelope)
			}
			name := left[0]
			left = left[1:]
			end := fmt.Sprintf("<wsen:EnumerationContext>uuid:ctx&amp;%d</wsen:EnumerationContext>", len(names)-len(left))
			if len(left) == 0 {
				end = "<wsen:EndOfSequence/>"
			}
			return soap(a, `<wsen:PullResponse>`+end+`<wsen:Items>`+vm(name)+`</wsen:Items></wsen:PullResponse>`)
		case "Release":
			if !strings.Contains(a.envelope, "<n:Release><n:EnumerationContext>uuid:ctx&amp;") {
				h.problem("release %s", a.envelope)
			}
			return soap(a, "")
		}
		h.problem("unexpected %s", a.action)
		return reply{drop: true}
	}
}

func TestEnumerationGoesOnToItsEnd(t *testing.T) {
	h := newHost(t, true, pages("a", "b", "c"))
	var names []string
	for in, err := range h.client().Enumerate(ctx, "Msvm_ComputerSystem") {
		if err != nil {
			t.Fatal(err)
		}
		name, err := Prop[string](in, "name")
		if err != nil || in.Class != "Msvm_ComputerSystem" || in.Namespace != "root/virtualization/v2" {
			t.Errorf("%+v, %v", in, err)
		}
		names = append(names, name)
	}
	if strings.Join(names, "") != "abc" || strings.Join(h.log(), " ") != "Enumerate Pull Pull Pull" {
		t.Errorf("%v by %v", names, h.log())
	}
}

func TestEnumerationThatIsLeftIsReleased(t *testing.T) {
	h := newHost(t, false, pages("a", "b", "c"))
	canceled, cancel := context.WithCancel(ctx)
	defer cancel()
	for range h.client().Enumerate(canceled, "Msvm_ComputerSystem") {
		cancel() // the release has to get through all the same
		break
	}
	if got := strings.Join(h.log(), " "); got != "Enumerate Pull Release" {
		t.Error(got)
	}
}

func TestEnumerationThatNeitherGoesOnNorEnds(t *testing.T) {
	for name, context := range map[string]string{"always the same context": "<wsen:EnumerationContext>c</wsen:EnumerationContext>", "no context": ""} {
		h := newHost(t, true, func(_ *host, a *asked) reply {
			return soap(a, "<wsen:"+a.method+"Response>"+context+"</wsen:"+a.method+"Response>")
		})
		if _, err := All(h.client().Enumerate(ctx, "X")); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReferencesAreEnumerated(t *testing.T) {
	h := newHost(t, true, always(`<wsen:EnumerateResponse><wsman:Items><wsa:EndpointReference><wsa:Address>x</wsa:Address><wsa:ReferenceParameters><wsman:ResourceURI>`+r2+`Msvm_X</wsman:ResourceURI><wsman:SelectorSet><wsman:Selector Name="InstanceID">a\b</wsman:Selector><wsman:Selector Name="__cimnamespace">root/virtualization/v2</wsman:Selector></wsman:SelectorSet></wsa:ReferenceParameters></wsa:EndpointReference></wsman:Items><wsman:EndOfSequence/></wsen:EnumerateResponse>`))
	refs, err := All(h.client().EnumerateRefs(ctx, "Msvm_X"))
	if err != nil || len(refs) != 1 || refs[0].String() != `root/virtualization/v2:Msvm_X.InstanceID="a\\b"` {
		t.Errorf("%v, %v", refs, err)
	}
}

// What changes nothing is asked again; what may have been done is not, and the
// error says so.
func TestDroppedConnections(t *testing.T) {
	first := func(next func(*host, *asked) reply) func(*host, *asked) reply {
		return func(h *host, a *asked) reply {
			if a.number == 0 {
				return reply{drop: true}
			}
			return next(h, a)
		}
	}
	var failed *ConnectionError

	h := newHost(t, false, first(always(vm("x"))))
	if _, err := h.client().Get(ctx, vssService); err != nil || len(h.log()) != 2 {
		t.Errorf("get: %v after %v", err, h.log())
	}
	h = newHost(t, true, first(pages("a", "b")))
	if all, err := All(h.client().Enumerate(ctx, "Msvm_ComputerSystem")); err != nil || len(all) != 2 {
		t.Errorf("enumerate: %d, %v", len(all), err)
	}
	h = newHost(t, false, first(always("")))
	_, err := h.client().Invoke(ctx, vssService, "DestroySnapshot")
	if !errors.As(err, &failed) || !failed.Sent || len(h.log()) != 1 {
		t.Errorf("invoke: %v after %v", err, h.log())
	}
	h = newHost(t, true, first(always("")))
	if _, err := h.client().Put(ctx, vssService, NewInstance("X")); !errors.As(err, &failed) || !failed.Sent || len(h.log()) != 1 {
		t.Errorf("put: %v after %v", err, h.log())
	}
	// A lost page would be missing, so a Pull ends the enumeration.
	h = newHost(t, false, func(h *host, a *asked) reply {
		if a.method == "Pull" {
			return reply{drop: true}
		}
		return pages("a", "b")(h, a)
	})
	_, err = All(h.client().Enumerate(ctx, "Msvm_ComputerSystem"))
	if !errors.As(err, &failed) || strings.Join(h.log(), " ") != "Enumerate Pull" || !strings.Contains(err.Error(), "pull: no answer from 127.0.0.1") {
		t.Errorf("pull: %v after %v", err, h.log())
	}
}

// A method may be called again if nobody was there to get the first call.
func TestInvokeIsRepeatedWhereNothingWasSent(t *testing.T) {
	h := newHost(t, false, always(`<x:M_OUTPUT xmlns:x="`+r2+`C"/>`))
	var seen []error
	c := h.client()
	real := c.core.host
	c.core.host = "127.0.0.1:1" // where nobody listens
	c.core.record = func(x Exchange) {
		if seen = append(seen, x.Err); len(seen) == 2 {
			c.core.host = real
		}
	}
	_, err := c.Invoke(ctx, NewRef("C"), "M")
	var failed *ConnectionError
	if err != nil || len(seen) != 3 || !errors.As(seen[0], &failed) || failed.Sent {
		t.Errorf("%v after %v", err, seen)
	}
	c.core.host, c.core.record = "127.0.0.1:1", nil
	c.idle = nil
	if _, err := c.Invoke(ctx, NewRef("C"), "M"); !errors.As(err, &failed) || failed.Sent || len(h.log()) != 1 {
		t.Errorf("nobody there: %v", err)
	}
}

// A connection that the host has closed while it lay idle is not used for what
// must not be sent twice.
func TestIdleConnectionThatTheHostClosed(t *testing.T) {
	for _, tls := range ways() {
		h := newHost(t, tls, func(h *host, a *asked) reply {
			if a.method == "Get" {
				return soap(a, vm("x"))
			}
			return soap(a, `<x:M_OUTPUT xmlns:x="`+r2+`C"/>`)
		})
		c := h.client()
		if _, err := c.Get(ctx, NewRef("C")); err != nil {
			t.Fatal(err)
		}
		h.srv.CloseClientConnections()
		// The end of the connection may need a moment to come through.
		for limit := time.Now().Add(30 * time.Second); len(c.idle) > 0 && c.idle[0].alive(time.Now()) && time.Now().Before(limit); {
			time.Sleep(time.Millisecond)
		}
		if _, err := c.Invoke(ctx, NewRef("C"), "M"); err != nil || h.conns != 2 {
			t.Errorf("tls %v: %v with %d connections", tls, err, h.conns)
		}
	}
}

// NTLM's state belongs to a connection: however many ask at once, each has one
// to itself, and no more are made than allowed.
func TestPoolHasOneRequestOnAConnection(t *testing.T) {
	for _, tls := range ways() {
		h := newHost(t, tls, func(_ *host, a *asked) reply {
			return soap(a, strings.Replace(vm("x"), "<x:Name>x", "<x:Name>"+between(a.envelope, `<w:Selector Name="Name">`), 1))
		})
		c := h.client(func(cfg *Config) { cfg.Connections = 3 })
		var wg sync.WaitGroup
		for i := range 24 {
			wg.Go(func() {
				want := fmt.Sprint("vm", i)
				in, err := c.Get(ctx, NewRef("Msvm_ComputerSystem", "Name", want))
				if err != nil {
					t.Error(err)
					return
				}
				if got, _ := Prop[string](in, "Name"); got != want {
					t.Errorf("asked for %s, got %s", want, got)
				}
			})
		}
		wg.Wait()
		if h.conns > 3 || h.signIns != h.conns {
			t.Errorf("tls %v: %d connections, %d sign-ins", tls, h.conns, h.signIns)
		}
	}
}

func TestClosedClientRefuses(t *testing.T) {
	h := newHost(t, false, always(vm("x")))
	c := h.client()
	if _, err := c.Get(ctx, NewRef("C")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	c.Close()
	if _, err := c.Get(ctx, NewRef("C")); !errors.Is(err, errClosed) {
		t.Error(err)
	}
}

func TestRequestEndsWithItsContext(t *testing.T) {
	for _, tls := range ways() {
		hang := make(chan struct{})
		canceled, cancel := context.WithCancelCause(ctx)
		why := errors.New("the user said so")
		h := newHost(t, tls, func(_ *host, a *asked) reply {
			cancel(why)
			<-hang
			return soap(a, vm("x"))
		})
		t.Cleanup(func() { close(hang) })
		c := h.client()
		if _, err := c.Get(canceled, NewRef("C")); !errors.Is(err, why) {
			t.Errorf("tls %v: %v", tls, err)
		}
		if len(c.idle) != 0 || len(c.places) != 0 {
			t.Errorf("tls %v: %d idle, %d lent", tls, len(c.idle), len(c.places))
		}
	}
}

// A host that says nothing is given up after the timeout, and not asked again:
// it may be at work.
func TestSilentHostTimesOut(t *testing.T) {
	hang := make(chan struct{})
	h := newHost(t, false, func(_ *host, a *asked) reply { <-hang; return reply{drop: true} })
	t.Cleanup(func() { close(hang) })
	c := h.client(func(cfg *Config) { cfg.Timeout = time.Millisecond })
	c.signInFirst(t)
	c.travel = 100 * time.Millisecond
	_, err := c.Get(ctx, NewRef("C"))
	var failed *ConnectionError
	if !errors.Is(err, ErrTimedOut) || !errors.As(err, &failed) || !failed.Sent || len(h.log()) > 1 {
		t.Errorf("%v after %v", err, h.log())
	}
}

// signInFirst makes a connection so that what follows does not wait for it.
func (c *Client) signInFirst(t *testing.T) {
	t.Helper()
	conn, err := c.borrow(ctx)
	if err == nil {
		conn, err = c.connect(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.give(conn)
}

// The recorder sees what was said, in clear, and no password.
func TestRecorderSeesBothSidesInClear(t *testing.T) {
	for _, tls := range ways() {
		h := newHost(t, tls, always(vm("x")))
		var got []Exchange
		c := h.client(func(cfg *Config) { cfg.Record = func(x Exchange) { got = append(got, x) } })
		if _, err := c.Get(ctx, NewRef("C")); err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || !strings.Contains(string(got[0].Request), "/transfer/Get<") || !strings.Contains(string(got[0].Response), "<x:Name>x<") || got[0].Status != 200 || got[0].Err != nil {
			t.Errorf("%+v", got)
		}
	}
}

func TestPasswordsShowNowhere(t *testing.T) {
	hidden := func(what string) {
		t.Helper()
		for _, s := range []string{testPassword, "bm9ib2R5O", "hörse"} {
			if strings.Contains(what, s) {
				t.Errorf("%q shows the password", what)
			}
		}
	}
	h := newHost(t, true, always(vm("x")))
	h.ntlm.Password = "another"
	for _, basic := range []bool{false, true} {
		h.basic = basic
		var seen []string
		c := h.client(func(cfg *Config) {
			if basic {
				cfg.Auth = Basic
			}
			cfg.Record = func(x Exchange) { seen = append(seen, string(x.Request)+string(x.Response)+fmt.Sprint(x.Err)) }
		})
		_, err := c.Get(ctx, NewRef("C"))
		if !errors.Is(err, fault.ErrDenied) {
			t.Errorf("%v", err)
		}
		hidden(fmt.Sprintf("%v %+v %#v %s %v %+v %#v %+v %v", err, err, err, c, c, c, c, h.config(), seen))
	}
	_, err := New(Config{URL: "https://user:" + testPassword + "@hv01", User: "u", Password: secret.New([]byte(testPassword))})
	if err == nil {
		t.Fatal("a password in the URL is taken")
	}
	hidden(err.Error())
}

func TestSettingsThatCannotBeMeant(t *testing.T) {
	pw := secret.New([]byte("p"))
	for name, cfg := range map[string]Config{
		"Basic over HTTP":        {URL: "http://hv01", User: "u", Password: pw, Auth: Basic},
		"no scheme":              {URL: "hv01", User: "u", Password: pw},
		"another scheme":         {URL: "ftp://hv01", User: "u", Password: pw},
		"no host":                {URL: "https:///wsman", User: "u", Password: pw},
		"no user":                {URL: "https://hv01", Password: pw},
		"no password":            {URL: "https://hv01", User: "u"},
		"a pin without TLS":      {URL: "http://hv01", User: "u", Password: pw, Pin: &Fingerprint{}},
		"a namespace with a dot": {URL: "https://hv01", User: "u", Password: pw, Namespace: "root/../x"},
		"a tiny envelope":        {URL: "https://hv01", User: "u", Password: pw, MaxEnvelope: 100},
		"no such sign-in":        {URL: "https://hv01", User: "u", Password: pw, Auth: 7},
		"a query":                {URL: "https://hv01/wsman?x", User: "u", Password: pw},
		"Basic with a colon":     {URL: "https://hv01", User: "a:b", Password: pw, Auth: Basic},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	for url, want := range map[string]string{
		"https://hv01": "https://hv01:5986/wsman", "http://hv01/": "http://hv01:5985/wsman", "https://hv01:443/other": "https://hv01:443/other", "http://[fe80::1]": "http://[fe80::1]:5985/wsman",
	} {
		c, err := New(Config{URL: url, User: "u", Password: pw})
		if err != nil || c.String() != want {
			t.Errorf("%s is %v, %v", url, c, err)
		}
	}
}

// Names that would break out of the request are refused before it is sent.
func TestNamesAreNoXML(t *testing.T) {
	h := newHost(t, false, always(""))
	c := h.client()
	for name, err := range map[string]error{
		"a class":     second(c.Get(ctx, NewRef("A><B"))),
		"a key":       second(c.Get(ctx, NewRef("A", `x" y="`, "v"))),
		"a method":    second(c.Invoke(ctx, NewRef("A"), "M></s:Body>")),
		"a parameter": second(c.Invoke(ctx, NewRef("A"), "M", Arg("a b", Of("x")))),
		"a value":     second(c.Invoke(ctx, NewRef("A"), "M", Arg("a", Of("x\x00y")))),
		"bad UTF-8":   second(c.Get(ctx, NewRef("A", "x", "\xff"))),
		"enumerate":   second(All(c.Enumerate(ctx, "A/B"))),
		"a property":  second(c.Invoke(ctx, NewRef("A"), "M", Arg("a", Of(NewInstance("C").Set("b c", Of("x")))))),
	} {
		if err == nil {
			t.Errorf("%s that cannot be one is sent", name)
		}
	}
	if !slices.Equal(h.log(), nil) {
		t.Errorf("sent %v", h.log())
	}
}

func second[T any](_ T, err error) error { return err }
