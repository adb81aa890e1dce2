package hyperv_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// importer does over pywinrm what an importer does: it knows the host's classes
// by their pages alone, and nothing of our client.
const importer = `
import os, sys, time, uuid
import xml.etree.ElementTree as ET
from xml.sax.saxutils import escape
from winrm.transport import Transport
url, user, file, disk = sys.argv[1:5]
t = Transport(url, username=user, password=os.environ['PASSWORD'], auth_method='ntlm', server_cert_validation='ignore', read_timeout_sec=60)
R = 'http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/'
A, W, N, X = ('http://schemas.xmlsoap.org/ws/2004/08/addressing', 'http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd',
    'http://schemas.xmlsoap.org/ws/2004/09/enumeration', 'http://schemas.xmlsoap.org/ws/2004/09/transfer')
def selectors(keys):
    return '<w:SelectorSet>' + ''.join('<w:Selector Name="%s">%s</w:Selector>' % (k, escape(v)) for k, v in keys.items()) + '</w:SelectorSet>'
def send(action, uri, body, keys=None):
    answer = t.send_message('<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="%s" xmlns:w="%s" xmlns:n="%s"><s:Header>'
        '<a:To>%s</a:To><a:Action s:mustUnderstand="true">%s</a:Action><w:ResourceURI s:mustUnderstand="true">%s</w:ResourceURI><a:MessageID>uuid:%s</a:MessageID>'
        '<a:ReplyTo><a:Address>%s/role/anonymous</a:Address></a:ReplyTo><w:MaxEnvelopeSize>512000</w:MaxEnvelopeSize><w:OperationTimeout>PT60S</w:OperationTimeout>%s'
        '</s:Header><s:Body>%s</s:Body></s:Envelope>' % (A, W, N, url, action, uri, uuid.uuid4(), A, selectors(keys) if keys else '', body))
    return ET.fromstring(answer)
def reference(e):
    return (e.find('.//{%s}ResourceURI' % W).text[len(R):], {s.get('Name'): s.text for s in e.iter('{%s}Selector' % W)})
def argument(ref):
    return '<a:Address>%s/role/anonymous</a:Address><a:ReferenceParameters><w:ResourceURI>%s</w:ResourceURI>%s</a:ReferenceParameters>' % (A, R + ref[0], selectors(ref[1]))
def query(wql):
    e = send(N + '/Enumerate', R + '*', '<n:Enumerate><w:OptimizeEnumeration/><w:MaxElements>1000</w:MaxElements>'
        '<w:Filter Dialect="http://schemas.microsoft.com/wbem/wsman/1/WQL">%s</w:Filter></n:Enumerate>' % escape(wql))
    return list(e.find('.//{%s}Items' % W))
def prop(e, name):
    return [c.text for c in e if c.tag.endswith('}' + name)]
def text(e, name):
    return prop(e, name)[0]
SERVICE = ('Msvm_VirtualSystemManagementService', {'CreationClassName': 'Msvm_VirtualSystemManagementService'})
def call(method, args, on=SERVICE):
    uri = R + on[0]
    e = send(uri + '/' + method, uri, '<p:%s_INPUT xmlns:p="%s">%s</p:%s_INPUT>' % (method, uri, ''.join('<p:%s>%s</p:%s>' % (k, v, k) for k, v in args), method), on[1])
    out = e.find('.//{%s}%s_OUTPUT' % (uri, method))
    return out, int(text(out, 'ReturnValue'))
def run(method, args):
    out, code = call(method, args)
    assert code == 4096, (method, code)
    job = reference(out.find('{%s}Job' % (R + SERVICE[0])))
    while True:
        state = send(X + '/Get', R + job[0], '', job[1])
        n = int(state.find('.//{%s}JobState' % (R + job[0])).text)
        if n >= 7:
            break
        time.sleep(0.05)
    errors, _ = call('GetErrorEx', [], job)
    made = []
    for row in query('SELECT * FROM Msvm_AffectedJobElement'):
        ends = {c.tag.split('}')[1]: c for c in row}
        if reference(ends['AffectingElement'])[1] == job[1] and '5' in prop(row, 'ElementEffects'):
            made.append(reference(ends['AffectedElement']))
    return n, made, [ET.fromstring(x).find("PROPERTY[@NAME='MessageID']/VALUE").text for x in prop(errors, 'Errors') if x]
def path(ref):
    return ref[0] + '.' + ','.join('%s="%s"' % (k, v.replace('\\', '\\\\')) for k, v in ref[1].items())
def embedded(cls, props):
    return '<![CDATA[<INSTANCE CLASSNAME="%s">%s</INSTANCE>]]>' % (cls, props)

n, made, _ = run('ImportSystemDefinition', [('SystemDefinitionFile', file), ('SnapshotFolder', ''), ('GenerateNewSystemIdentifier', 'true')])
print('import', n, made[0][0])
planned = made[0]
settings = query('ASSOCIATORS OF {%s} WHERE AssocClass=Msvm_SettingsDefineState' % path(planned))[0]
conf = ('Msvm_VirtualSystemSettingData', {'InstanceID': text(settings, 'InstanceID')})
print('settings', text(settings, 'VirtualSystemType'))
n, _, ids = run('ValidatePlannedSystem', [('PlannedSystem', argument(planned))])
print('validate', n, ids)
n, _, ids = run('RealizePlannedSystem', [('PlannedSystem', argument(planned))])
print('realize', n, ids)
sasd = query('ASSOCIATORS OF {%s} WHERE AssocClass=Msvm_VirtualSystemSettingDataComponent ResultClass=Msvm_StorageAllocationSettingData' % path(conf))[0]
n, _, _ = run('ModifyResourceSettings', [('ResourceSettings', embedded('Msvm_StorageAllocationSettingData',
    '<PROPERTY NAME="InstanceID" TYPE="string"><VALUE>%s</VALUE></PROPERTY><PROPERTY.ARRAY NAME="HostResource" TYPE="string"><VALUE.ARRAY><VALUE>%s</VALUE></VALUE.ARRAY></PROPERTY.ARRAY>'
    % (escape(text(sasd, 'InstanceID')), escape(disk))))])
print('disk', n)
n, _, _ = run('ModifySystemSettings', [('SystemSettings', embedded('Msvm_VirtualSystemSettingData',
    '<PROPERTY NAME="InstanceID" TYPE="string"><VALUE>%s</VALUE></PROPERTY><PROPERTY NAME="ElementName" TYPE="string"><VALUE>restored</VALUE></PROPERTY>' % escape(conf[1]['InstanceID'])))])
print('name', n)
n, _, ids = run('ValidatePlannedSystem', [('PlannedSystem', argument(planned))])
print('validate', n, ids)
n, made, _ = run('RealizePlannedSystem', [('PlannedSystem', argument(planned))])
print('realize', n, made[0][0])
vm = made[0]
print('name', [text(v, 'ElementName') for v in query("SELECT * FROM Msvm_ComputerSystem WHERE Name='%s'" % vm[1]['Name'])])
print('planned', len(query('SELECT * FROM Msvm_PlannedComputerSystem')))
out, code = call('RequestStateChange', [('RequestedState', '2')], vm)
print('start', code)
`

// A client that others wrote imports a definition, is told what is wrong with
// it, mends it, and has a VM that runs.
func TestPywinrmImports(t *testing.T) {
	const module = "/usr/lib/python3/dist-packages/winrm"
	if testing.Short() {
		t.Skip("starts an interpreter")
	}
	if _, err := os.Stat(module); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatalf("%s is missing: run scripts/need test", module)
		}
		t.Skipf("%s is missing", module)
	}
	dir := t.TempDir()
	h, err := host.New(host.Options{Dir: dir, JobTime: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	id, err := h.AddVM(host.Spec{Name: "web01", Disks: []host.DiskSpec{{Bytes: 4 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(h.Local(`C:\Restored`), 0o755); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{`C:\VMs\web01\Virtual Machines\` + id + ".vmcx": `C:\Restored\a.vmcx`, `C:\VMs\web01\Virtual Hard Disks\web01-0.vhdx`: `C:\Restored\a.vhdx`} {
		p, err := os.ReadFile(h.Local(from))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.Local(to), p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const password = "Pässw0rd"
	e, err := hyperv.Serve(h, "HV01", hyperv.Options{User: "Administrator", Password: password, HTTP: true, Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	script, legacy := filepath.Join(dir, "import.py"), filepath.Join(dir, "openssl.cnf")
	for file, content := range map[string]string{script: importer,
		// NTLM needs MD4, which OpenSSL has only among what is obsolete.
		legacy: "openssl_conf = init\n[init]\nproviders = p\n[p]\ndefault = on\nlegacy = on\n[on]\nactivate = 1\n"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.Command("/usr/bin/python3", "-W", "ignore", script, e.URL, "Administrator", `C:\Restored\a.vmcx`, `C:\Restored\a.vhdx`)
	c.Env = append(os.Environ(), "NO_PROXY=*", "OPENSSL_CONF="+legacy, "PASSWORD="+password)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := []string{
		"import 7 Msvm_PlannedComputerSystem",
		"settings Microsoft:Hyper-V:System:Planned",
		"validate 32768 ['40010']",
		"realize 10 ['40010']",
		"disk 7", "name 7",
		"validate 7 []",
		"realize 7 Msvm_ComputerSystem",
		"name ['restored']",
		"planned 0",
		"start 4096",
	}
	if got := strings.TrimSpace(string(out)); got != strings.Join(want, "\n") {
		t.Errorf("it went so:\n%s\nand not so:\n%s", got, strings.Join(want, "\n"))
	}
}
