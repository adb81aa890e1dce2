package recording

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/wsman"
)

// answer is an envelope with one instance, whose properties are XML.
func answer(properties string) string {
	const class = "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/Msvm_ComputerSystem"
	return `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xml:lang="en-US">` +
		`<s:Header><a:RelatesTo>uuid:0F1E2D3C-0000-1111-2222-333344445555</a:RelatesTo></s:Header><s:Body><p:Msvm_ComputerSystem xmlns:p="` + class + `" xsi:type="p:Msvm_ComputerSystem_Type">` +
		properties + `</p:Msvm_ComputerSystem></s:Body></s:Envelope>`
}

func sanitised(t *testing.T, texts ...string) []string {
	t.Helper()
	s := newSanitiser()
	for _, x := range texts {
		if _, err := s.envelope(x); err != nil {
			t.Fatal(err)
		}
	}
	s.number()
	var out []string
	for _, x := range texts {
		y, err := s.envelope(x)
		if err != nil {
			t.Fatal(err)
		}
		_, y, _ = strings.Cut(y, "_Type\">")
		y, _, _ = strings.Cut(y, "</p:Msvm_ComputerSystem>")
		out = append(out, y)
	}
	return out
}

// What tells of a host or its people goes; what every host says stays.
func TestWhatStaysAndWhatGoes(t *testing.T) {
	kvp := func(key, value string) string {
		return `<p:GuestIntrinsicExchangeItems>&lt;INSTANCE CLASSNAME="Msvm_KvpExchangeDataItem"&gt;&lt;PROPERTY NAME="Data" TYPE="string"&gt;&lt;VALUE&gt;` + value +
			`&lt;/VALUE&gt;&lt;/PROPERTY&gt;&lt;PROPERTY NAME="Name" TYPE="string"&gt;&lt;VALUE&gt;` + key + `&lt;/VALUE&gt;&lt;/PROPERTY&gt;&lt;/INSTANCE&gt;</p:GuestIntrinsicExchangeItems>`
	}
	for _, c := range []struct{ name, in, want string }{
		{"a number of a class", `<p:EnabledState>2</p:EnabledState>`, `<p:EnabledState>2</p:EnabledState>`},
		{"no number where one belongs", `<p:EnabledState>acme</p:EnabledState>`, `<p:EnabledState>word00001</p:EnabledState>`},
		{"a number of nobody knows what", `<p:CustomerNumber>4711</p:CustomerNumber>`, `<p:CustomerNumber>9000001</p:CustomerNumber>`},
		{"a truth", `<p:Anything>TRUE</p:Anything>`, `<p:Anything>TRUE</p:Anything>`},
		{"a time", `<p:InstallDate><c:Datetime xmlns:c="http://schemas.dmtf.org/wbem/wscim/1/common">2026-01-02T03:04:05.6Z</c:Datetime></p:InstallDate>`,
			`<p:InstallDate><c:Datetime xmlns:c="http://schemas.dmtf.org/wbem/wscim/1/common">2026-01-02T03:04:05.6Z</c:Datetime></p:InstallDate>`},
		{"a type", `<p:VirtualSystemType>Microsoft:Hyper-V:System:Realized</p:VirtualSystemType>`, `<p:VirtualSystemType>Microsoft:Hyper-V:System:Realized</p:VirtualSystemType>`},
		{"a name of known words", `<p:ElementName>Virtual Machine</p:ElementName>`, `<p:ElementName>text00001</p:ElementName>`},
		{"a GUID, small and large", `<p:Name>aBCDEF00-0000-1111-2222-333344445555</p:Name><p:InstanceID>Microsoft:ABCDEF00-0000-1111-2222-333344445555</p:InstanceID>`,
			`<p:Name>00000002-0000-4000-8000-000000000000</p:Name><p:InstanceID>Microsoft:00000002-0000-4000-8000-000000000000</p:InstanceID>`},
		{"a device and its place", `<p:InstanceID>Microsoft:ABCDEF00-0000-1111-2222-333344445555\83F8638B-8DCA-4152-9EDA-2CA8B33039B4\0\12\D</p:InstanceID>`,
			`<p:InstanceID>Microsoft:00000003-0000-4000-8000-000000000000\00000002-0000-4000-8000-000000000000\0\12\D</p:InstanceID>`},
		{"what follows a GUID and is no place", `<p:InstanceID>ABCDEF00-0000-1111-2222-333344445555\0\Acme</p:InstanceID>`,
			`<p:InstanceID>00000002-0000-4000-8000-000000000000\9000001\word00001</p:InstanceID>`},
		{"a path", `<p:HostResource>C:\ClusterStorage\Kunden\web-01.avhdx</p:HostResource>`, `<p:HostResource>C:\ClusterStorage\word00001\word00002-9000001.avhdx</p:HostResource>`},
		{"a share", `<p:HostResource>\\fs.acme.example\vms$\a.vhdx</p:HostResource>`, `<p:HostResource>\\word00004.word00002.word00003\word00005$\word00001.vhdx</p:HostResource>`},
		{"an object path", `<p:Parent>\\HV7\root\virtualization\v2:Msvm_ResourcePool.InstanceID="Microsoft:Definition\\ABCDEF00-0000-1111-2222-333344445555\\Default"</p:Parent>`,
			`<p:Parent>\\word00001\root\virtualization\v2:Msvm_ResourcePool.InstanceID=&#34;Microsoft:Definition\\00000002-0000-4000-8000-000000000000\\Default&#34;</p:Parent>`},
		{"an address of IPv4 and of IPv6", `<p:X>10.20.0.5 fe80::1c2:ab</p:X>`, `<p:X>9000001.9000002.9000003.9000004 word00003::word00001:word00002</p:X>`},
		{"a hardware address", `<p:Address>00155D01AB02</p:Address>`, `<p:Address>020000000001</p:Address>`},
		{"no hardware address", `<p:Address>000000000000</p:Address>`, `<p:Address>000000000000</p:Address>`},
		{"a generation", `<p:VirtualSystemSubType>Microsoft:Hyper-V:SubType:2</p:VirtualSystemSubType>`, `<p:VirtualSystemSubType>Microsoft:Hyper-V:SubType:2</p:VirtualSystemSubType>`},
		{"what is no generation", `<p:VirtualSystemSubType>Microsoft:Hyper-V:SubType:2012</p:VirtualSystemSubType>`, `<p:VirtualSystemSubType>Microsoft:Hyper-V:SubType:9000001</p:VirtualSystemSubType>`},
		{"WMI's errors", `<p:StatusCode>-2147217406</p:StatusCode><p:MessageID>HRESULT 0x80041002</p:MessageID><p:MessageID>33012</p:MessageID>`,
			`<p:StatusCode>-2147217406</p:StatusCode><p:MessageID>HRESULT 0x80041002</p:MessageID><p:MessageID>33012</p:MessageID>`},
		{"what is no error of WMI", `<p:MessageID>HRESULT acme</p:MessageID>`, `<p:MessageID>word00002 word00001</p:MessageID>`},
		{"a slot", `<p:AddressOnParent>1</p:AddressOnParent>`, `<p:AddressOnParent>1</p:AddressOnParent>`},
		{"a serial number of single letters", `<p:BIOSSerialNumber>A-C-M-E 1 2 3</p:BIOSSerialNumber>`, `<p:BIOSSerialNumber>word00001-word00002-word00004-word00003 9000001 9000002 9000003</p:BIOSSerialNumber>`},
		{"notes", `<p:Notes>ask Eve, 0170 123</p:Notes>`, `<p:Notes>text00001</p:Notes>`},
		{"a word cut in two by a section", `<p:X>ac<![CDATA[me]]></p:X>`, `<p:X>word00001</p:X>`},
		{"a word with a comment in it", `<p:X>ac<!-- acme -->me</p:X>`, `<p:X>word00001</p:X>`},
		{"base64", `<p:X>MIIB+w/AbCd==</p:X>`, `<p:X>word00002+word00003/word00001==</p:X>`},
		{"a guest's version", kvp("OSVersion", "10.0.20348"), "NAME"},
		{"an unknown attribute", `<p:X Owner="acme">1</p:X>`, `<p:X Owner="text00001">9000001</p:X>`},
	} {
		got := sanitised(t, answer(c.in))[0]
		if c.want == "NAME" {
			if !strings.Contains(got, "10.0.20348") {
				t.Errorf("%s: %s", c.name, got)
			}
			continue
		}
		if got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
	for key, want := range map[string]bool{"OSName": true, "OSPlatformId": false, "FullyQualifiedDomainName": false, "NetworkAddressIPv4": false} {
		got := sanitised(t, answer(kvp(key, "Windows Server 2022 of Acme")))[0]
		if strings.Contains(got, "Acme") || strings.Contains(got, "Windows Server 2022") != want {
			t.Errorf("%s: %s", key, got)
		}
	}
}

// One value has one pseudonym everywhere, and whoever sorts pseudonyms gets the
// order of the originals.
func TestPseudonymsKeepOrderAndIdentity(t *testing.T) {
	got := sanitised(t, answer(`<p:X>zeta</p:X>`), answer(`<p:X>ALPHA</p:X>`), answer(`<p:X>\alpha\mid</p:X>`))
	want := []string{`<p:X>word00003</p:X>`, `<p:X>word00001</p:X>`, `<p:X>\word00001\word00002</p:X>`}
	if strings.Join(got, "") != strings.Join(want, "") {
		t.Errorf("%q", got)
	}
}

// What number a number gets says when it came, and nothing of how large it is.
func TestNumbersKeepNoOrder(t *testing.T) {
	got := sanitised(t, answer(`<p:X>443</p:X>`), answer(`<p:X>8</p:X><p:Y>web-9</p:Y>`), answer(`<p:X>10.443.8</p:X>`))
	want := []string{`<p:X>9000001</p:X>`, `<p:X>9000002</p:X><p:Y>word00001-9000003</p:Y>`, `<p:X>9000004.9000001.9000002</p:X>`}
	if strings.Join(got, "") != strings.Join(want, "") {
		t.Errorf("%q", got)
	}
}

// What cannot be judged is not kept.
func TestWhatIsLeftOut(t *testing.T) {
	good := answer(`<p:X>1</p:X>`)
	for name, bad := range map[string]string{
		"a page of a proxy":     `<html><body>acme</body></html>`,
		"no XML":                "acme",
		"half an envelope":      good[:len(good)-20],
		"a foreign namespace":   strings.Replace(good, "http://www.w3.org/2001/XMLSchema-instance", "http://acme.example/x", 1),
		"a document type":       `<!DOCTYPE x [<!ENTITY acme "acme">]>` + good,
		"elements that cross":   strings.Replace(good, `<p:X>1</p:X>`, `<p:X><p:Y></p:X></p:Y>`, 1),
		"text behind the end":   good + "acme",
		"an element's odd name": strings.Replace(good, `<p:X>1</p:X>`, `<p:Müller>1</p:Müller>`, 1),
	} {
		r := &Recorder{}
		r.Step("inventory")
		const get = "http://schemas.xmlsoap.org/ws/2004/09/transfer/Get"
		r.Record(wsman.Exchange{Action: get, Request: []byte(good), Response: []byte(bad), Status: 200})
		r.Record(wsman.Exchange{Action: get, Request: []byte(good), Response: []byte(good), Status: 200})
		r.Record(wsman.Exchange{Action: get, Request: []byte(good), Err: fmt.Errorf("acme")})
		c, err := r.Recording(About{OS: "acme", By: "test"}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := c.Write(&out); err != nil {
			t.Fatal(err)
		}
		if c.LeftOut != 1 || c.Unanswered != 1 || len(c.Exchanges) != 1 || strings.Contains(out.String(), "acme") {
			t.Errorf("%s: %s", name, out.String())
		}
	}
}

func TestRead(t *testing.T) {
	const header = `{"format":"backstay-hyperv-recording","version":1}` + "\n"
	for text, want := range map[string]string{
		"": "is no recording", `{"format":"other"}`: "is no recording", "{": "line 1", `{"format":"backstay-hyperv-recording","version":2}`: "of version 2",
		header + "{}\n{": "line 3", header: "",
	} {
		_, err := Read(strings.NewReader(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// Whatever a host answers, what is replaced does not stay, and what was
// sanitised can be sanitised again.
func FuzzSanitise(f *testing.F) {
	f.Add(answer(`<p:HostResource>C:\a\b.vhdx</p:HostResource>`))
	f.Add(answer(`<p:X>&lt;INSTANCE CLASSNAME="Msvm_X"&gt;&lt;PROPERTY NAME="Name"&gt;&lt;VALUE&gt;x&lt;/VALUE&gt;&lt;/PROPERTY&gt;&lt;/INSTANCE&gt;</p:X>`))
	f.Fuzz(func(t *testing.T, text string) {
		s := newSanitiser()
		if _, err := s.envelope(text); err != nil {
			return
		}
		s.number()
		out, err := s.envelope(text)
		if err != nil {
			t.Fatalf("gathered, and then: %v", err)
		}
		again := newSanitiser()
		if _, err := again.envelope(out); err != nil {
			t.Fatalf("%q cannot be read again: %v", out, err)
		}
		if _, err := parse([]byte(out)); err != nil {
			t.Fatalf("%q cannot be played: %v", out, err)
		}
		for kind, all := range again.pseudonyms {
			for o := range all {
				if !pseudonym.MatchString(o) && kind != kindText {
					t.Fatalf("%s %q stayed in %q", kind, o, out)
				}
			}
		}
	})
}

// Recordings come from strangers.
func FuzzRead(f *testing.F) {
	f.Add(`{"format":"backstay-hyperv-recording","version":1}`+"\n"+`{"request":"<a/>","response":"<b/>"}`, `<a/>`)
	f.Fuzz(func(t *testing.T, file, request string) {
		c, err := Read(strings.NewReader(file))
		if err != nil {
			return
		}
		p := NewPlayer(c)
		for range min(len(c.Exchanges), 3) {
			p.next([]byte(request))
		}
	})
}
