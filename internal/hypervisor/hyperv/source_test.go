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
		"hyperv://u@hv01/x?smb=a&smb=b", "hyperv+http://u@hv01/x?ca=/etc/ca.pem", "hyperv+ftp://u@hv01/x",
	} {
		if host, name, err := ParseSource(in); err == nil {
			t.Errorf("%s is taken for %s, VM %q", in, host, name)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a password is shown: %v", in, err)
		}
	}
}
