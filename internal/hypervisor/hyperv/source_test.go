package hyperv

import (
	"strings"
	"testing"
)

func TestParseSource(t *testing.T) {
	pin := strings.Repeat("ab", 32)
	for _, c := range []struct{ in, host, name, user, port, smb string }{
		{"hyperv://backup@hv01/web01", "hyperv://backup@hv01", "web01", "backup", "5986", "hv01:445"},
		{"hyperv://backup@hv01", "hyperv://backup@hv01", "", "backup", "5986", "hv01:445"},
		{"hyperv://backup@hv01/", "hyperv://backup@hv01", "", "backup", "5986", "hv01:445"},
		{"hyperv+http://LAB%5Cbackup@hv01:1234/a%2Fb", "hyperv+http://LAB%5Cbackup@hv01:1234", "a/b", `LAB\backup`, "1234", "hv01:445"},
		{"hyperv+http://u@hv01/x", "hyperv+http://u@hv01", "x", "u", "5985", "hv01:445"},
		{"hyperv://u@hv01/x?fingerprint=sha256:" + pin, "hyperv://u@hv01?fingerprint=sha256:" + pin, "x", "u", "5986", "hv01:445"},
		{"hyperv://u@hv01/x?smb=store:1445", "hyperv://u@hv01?smb=store:1445", "x", "u", "5986", "store:1445"},
		{"hyperv://u@hv01/x?smb=store", "hyperv://u@hv01?smb=store", "x", "u", "5986", "store:445"},
		{`hyperv://u@hv01/x?share=C:\VMs=vms&share=D:\=d`, `hyperv://u@hv01?share=C:\VMs=vms&share=D:\=d`, "x", "u", "5986", "hv01:445"},
		{"hyperv://u@[::1]/x", "hyperv://u@[::1]", "x", "u", "5986", "[::1]:445"},
	} {
		host, name, err := ParseSource(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		a, err := parseAddress(host)
		if err != nil || host.String() != c.host || name != c.name || a.user != c.user || a.port != c.port || a.smb != c.smb {
			t.Errorf("%s: %s, VM %q, %+v, %v", c.in, host, name, a, err)
		}
	}
	for _, in := range []string{
		"hyperv://hv01/web01", "hyperv:///web01", "hyperv://u:secret@hv01/x", "hyperv://u@hv01/a/b", "hyperv://u@hv01/%zz", "hyperv://u:secret%@hv01/x",
		"hyperv://u@hv01/x?fingerprint=" + pin, "hyperv://u@hv01/x?fingerprint=sha256:abcd", "hyperv+http://u@hv01/x?fingerprint=sha256:" + pin,
		"hyperv+http://u@hv01/x?auth=basic", "hyperv://u@hv01/x?auth=digest", "hyperv://u@hv01/x?share=vms", "hyperv://u@hv01/x?color=red",
		"hyperv://u@hv01/x?smb=a&smb=b", "hyperv://u@hv01/x?smb=HV02=", "hyperv://u@hv01/x?node=HV02", "hyperv://u@hv01/x?node==a", "hyperv+http://u@hv01/x?ca=/etc/ca.pem", "hyperv+ftp://u@hv01/x",
	} {
		if host, name, err := ParseSource(in); err == nil {
			t.Errorf("%s is taken for %s, VM %q", in, host, name)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a password is shown: %v", in, err)
		}
	}
}

// A node is reached at its name, with the domain of the host that was named,
// unless the source says otherwise.
func TestNodeSource(t *testing.T) {
	for _, c := range []struct{ in, node, want, smb string }{
		{"hyperv://u@hv01", "HV02", "hyperv://u@HV02", "HV02:445"},
		{"hyperv://u@hvc.lab.local:1234", "HV02", "hyperv://u@HV02.lab.local:1234", "HV02.lab.local:445"},
		{"hyperv://u@192.0.2.1", "HV02", "hyperv://u@HV02", "HV02:445"},
		{"hyperv://u@hv01?smb=store", "HV02", "hyperv://u@HV02", "HV02:445"},
		{"hyperv://u@hv01:1?node=HV02=10.0.0.2&node=HV03=10.0.0.3:3&smb=HV03=store:33", "hv02", "hyperv://u@10.0.0.2:1", "10.0.0.2:445"},
		{"hyperv://u@hv01:1?node=HV02=10.0.0.2&node=HV03=10.0.0.3:3&smb=HV03=store:33", "HV03", "hyperv://u@10.0.0.3:3", "store:33"},
		{"hyperv://u@hv01?node=HV02=[::2]", "HV02", "hyperv://u@[::2]", "[::2]:445"},
	} {
		u, _, err := ParseSource(c.in)
		if err != nil {
			t.Fatal(err)
		}
		there := nodeSource(u, c.node)
		a, err := parseAddress(there, c.node)
		there.RawQuery = ""
		if err != nil || there.String() != c.want || a.smb != c.smb {
			t.Errorf("%s, node %s: %s, files at %s, %v; want %s, %s", c.in, c.node, there, a.smb, err, c.want, c.smb)
		}
	}
	u, _, err := ParseSource("hyperv://u@hvc?smb=a&smb=HV01=b:1")
	if err != nil {
		t.Fatal(err)
	}
	if a, err := parseAddress(u, "HV02"); err != nil || a.smb != "a:445" {
		t.Errorf("the host that is another node: %s, %v", a.smb, err)
	}
	if a, err := parseAddress(u, "HV01"); err != nil || a.smb != "b:1" {
		t.Errorf("the host that is the node: %s, %v", a.smb, err)
	}
}
