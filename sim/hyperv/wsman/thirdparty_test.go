package wsman_test

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/masterzen/winrm"
	"github.com/masterzen/winrm/soap"

	"github.com/backstay/backstay/sim/hyperv/wsman"
)

// Two implementations must agree before one is believed: here clients that
// others wrote meet the service.

// need skips without what, or fails where nothing may be skipped.
func need(t *testing.T, what string) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts an interpreter")
	}
	if _, err := os.Stat(what); err == nil {
		return
	}
	if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
		t.Fatalf("%s is missing: run scripts/need test", what)
	}
	t.Skipf("%s is missing", what)
}

// python runs a script with Debian's Python and gives what it printed.
func python(t *testing.T, script string, args ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "client.py")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	// NTLM needs MD4, which OpenSSL has only among what is obsolete.
	legacy := filepath.Join(t.TempDir(), "openssl.cnf")
	if err := os.WriteFile(legacy, []byte("openssl_conf = init\n[init]\nproviders = p\n[p]\ndefault = on\nlegacy = on\n[on]\nactivate = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("/usr/bin/python3", append([]string{"-W", "ignore", file}, args...)...)
	c.Env = append(os.Environ(), "NO_PROXY=*", "OPENSSL_CONF="+legacy, "PASSWORD="+password)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

const pywinrm = `
import os, sys
from winrm.transport import Transport
from winrm.exceptions import InvalidCredentialsError, WinRMTransportError
url, method, user, ca = sys.argv[1:5]
def client(password):
    return Transport(url, username=user, password=password, auth_method=method,
        ca_trust_path=ca or None, server_cert_validation='validate' if ca else 'ignore', read_timeout_sec=60)
c = client(os.environ['PASSWORD'])
for message in sys.argv[5:]:
    try:
        answer = c.send_message(message)
        print('200', answer if isinstance(answer, str) else answer.decode())
    except WinRMTransportError as e:
        print(e.code, e.response_text if isinstance(e.response_text, str) else e.response_text.decode())
try:
    client('wrong').send_message(sys.argv[5])
    print('a wrong password is good')
except InvalidCredentialsError:
    print('a wrong password is refused')
`

// pywinrm authenticates, seals, enumerates and gets its faults, and nothing it
// did on one connection lets in another.
func TestPywinrm(t *testing.T) {
	need(t, "/usr/lib/python3/dist-packages/winrm")
	for _, test := range []struct {
		name, auth, user string
		https            bool
	}{
		{"sealed", "ntlm", user, false},
		{"sealed, with a domain", "ntlm", `HV01\` + user, false},
		{"HTTPS with a binding", "ntlm", user, true},
		{"HTTPS and Basic", "basic", user, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url, ca := start(t, test.https, &wsman.Server{Basic: true, RequireBinding: true, Provider: few{vms: 30, notes: strings.Repeat("ä", 100)}})
			big := message(enumerate+"/Enumerate", base+"Msvm_VirtualSystemSettingData", "", "", "<n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>1000</w:MaxElements></n:Enumerate>")
			out := python(t, pywinrm, url, test.auth, test.user, ca, big,
				message(transfer+"/Get", base+"Msvm_ComputerSystem", "CreationClassName=Msvm_ComputerSystem Name=no", "", ""), big)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) != 4 || lines[0][:4] != "200 " || strings.Count(lines[0], "<p:Msvm_VirtualSystemSettingData ") != 30 || lines[2][:4] != "200 " {
				t.Fatalf("enumerate: %s", out)
			}
			if lines[1][:4] != "500 " || !strings.Contains(lines[1], "w:InvalidSelectors") {
				t.Errorf("fault: %s", lines[1])
			}
			if lines[3] != "a wrong password is refused" {
				t.Error(lines[3])
			}
		})
	}
}

const gssapi = `
import base64, http.client, os, struct, sys, urllib.parse
import gssapi
url = urllib.parse.urlsplit(sys.argv[1])
spnego = gssapi.OID.from_int_seq('1.3.6.1.5.5.2')
ntlm = gssapi.OID.from_int_seq('1.3.6.1.4.1.311.2.2.10')
mech = {'spnego': spnego, 'ntlm': ntlm}[sys.argv[2]]
name = gssapi.Name('winrm@127.0.0.1', gssapi.NameType.hostbased_service)
user = gssapi.Name(sys.argv[3], gssapi.NameType.user)
cred = gssapi.raw.acquire_cred_with_password(user, os.environ['PASSWORD'].encode(), usage='initiate', mechs=[mech]).creds
flags = gssapi.RequirementFlag.confidentiality | gssapi.RequirementFlag.integrity | gssapi.RequirementFlag.out_of_sequence_detection
c = gssapi.SecurityContext(name=name, creds=gssapi.Credentials(cred), usage='initiate', mech=mech, flags=flags)
h = http.client.HTTPConnection(url.hostname, url.port)
token, tokens = None, 0
while not c.complete:
    out = c.step(token)
    if not out:
        break
    h.request('POST', '/wsman', b'', {'Authorization': 'Negotiate ' + base64.b64encode(out).decode()})
    r = h.getresponse(); r.read(); tokens += 1
    auth = r.headers.get('WWW-Authenticate', '')
    token = base64.b64decode(auth.split(' ', 1)[1]) if ' ' in auth else None
    if token is None:
        break
assert r.status == 200 and c.complete, (r.status, c.complete)
B = b'--Encrypted Boundary'
for text in sys.argv[4:]:
    m = text.encode()
    w = c.wrap(m, True).message
    body = (B + b'\r\n\tContent-Type: application/HTTP-SPNEGO-session-encrypted\r\n\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length=%d\r\n' % len(m) +
        B + b'\r\n\tContent-Type: application/octet-stream\r\n' + struct.pack('<I', 16) + w + B + b'--\r\n')
    h.request('POST', '/wsman', body, {'Content-Type': 'multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"'})
    r = h.getresponse(); p = r.read()
    marker = b'\tContent-Type: application/octet-stream\r\n'
    sealed = p[p.index(marker) + len(marker):-len(B + b'--\r\n')]
    print(r.status, c.unwrap(sealed[4:]).message.decode())
`

// GSS-NTLMSSP, through MIT's SPNEGO and without, seals and unseals with us.
func TestGSSAPI(t *testing.T) {
	need(t, "/usr/lib/python3/dist-packages/gssapi")
	need(t, "/etc/gss/mech.d/mech.ntlmssp.conf")
	url, _ := start(t, false, &wsman.Server{Provider: few{vms: 3}})
	for _, mech := range []string{"spnego", "ntlm"} {
		t.Run(mech, func(t *testing.T) {
			get := message(transfer+"/Get", base+"Msvm_VirtualSystemSnapshotService", "CreationClassName=Msvm_VirtualSystemSnapshotService", "", "")
			out := python(t, gssapi, url, mech, user, get, message(transfer+"/Get", base+"Msvm_Nothing", "A=b", "", ""), get)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) != 3 || !strings.Contains(lines[0], "vssnapsvc") || !strings.Contains(lines[1], "a:DestinationUnreachable") || !strings.Contains(lines[2], "vssnapsvc") {
				t.Error(out)
			}
		})
	}
}

// masterzen/winrm seals by itself, and authenticates over HTTPS by another
// library than that.
func TestMasterzen(t *testing.T) {
	for _, test := range []struct {
		name  string
		https bool
	}{{"sealed", false}, {"HTTPS", true}} {
		t.Run(test.name, func(t *testing.T) {
			// One server for each message: it would authenticate again on a
			// connection that is authenticated.
			ask := func(password, class string) (string, error) {
				address, _ := start(t, test.https, &wsman.Server{Provider: few{vms: 3}})
				u, err := url.Parse(address)
				if err != nil {
					t.Fatal(err)
				}
				port, _ := strconv.Atoi(u.Port())
				endpoint := winrm.NewEndpoint(u.Hostname(), port, test.https, true, nil, nil, nil, time.Minute) // the test's own server
				var transport winrm.Transporter = &winrm.ClientNTLM{}
				if !test.https {
					if transport, err = winrm.NewEncryption("ntlm"); err != nil {
						t.Fatal(err)
					}
				}
				params := winrm.NewParameters("PT60S", "en-US", 153600)
				params.TransportDecorator = func() winrm.Transporter { return transport }
				client, err := winrm.NewClientWithParameters(endpoint, user, password, params)
				if err != nil {
					t.Fatal(err)
				}
				m := soap.NewMessage()
				m.Header().To(address).ReplyTo("http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous").MaxEnvelopeSize(153600).Id("uuid:7").Locale("en-US").Timeout("PT60S").
					Action(enumerate + "/Enumerate").ResourceURI(base + class).Build()
				e := m.CreateBodyElement("Enumerate", soap.DOM_NS_ENUM)
				m.CreateElement(e, "OptimizeEnumeration", soap.DOM_NS_WSMAN_DMTF)
				m.CreateElement(e, "MaxElements", soap.DOM_NS_WSMAN_DMTF).SetContent("10")
				return transport.Post(client, m)
			}
			if answer, err := ask(password, "Msvm_ComputerSystem"); err != nil || strings.Count(answer, "<p:Msvm_ComputerSystem ") != 3 {
				t.Errorf("%v %s", err, answer)
			}
			if answer, err := ask(password, "Msvm_Nothing"); !strings.Contains(fmt.Sprint(answer, err), "DestinationUnreachable") {
				t.Errorf("%v %s", err, answer)
			}
			if answer, err := ask("wrong", "Msvm_ComputerSystem"); err == nil || answer != "" {
				t.Errorf("a wrong password is good: %s", answer)
			}
		})
	}
}
