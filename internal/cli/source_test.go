package cli

import (
	"errors"
	"testing"

	"github.com/backstay/backstay/internal/fault"
)

func TestParseSource(t *testing.T) {
	for _, c := range []struct {
		in, scheme, host, vm string
	}{
		{"disk.raw", "", "", ""},
		{`C:\vm\disk.vhdx`, "", "", ""},
		{"c://odd", "", "", ""},
		{"kvm:///system", "kvm", "kvm:///system", ""},
		{"kvm:///system/", "kvm", "kvm:///system", ""},
		{"kvm:///system/web01", "kvm", "kvm:///system", "web01"},
		{"kvm:///system/a%2Fb", "kvm", "kvm:///system", "a/b"},
		{"hyperv://backup@hv01/web01?smb=store", "hyperv", "hyperv://backup@hv01?smb=store", "web01"},
		{"kvm:///system/web01?socket=/run/x", "kvm", "kvm:///system?socket=/run/x", "web01"},
	} {
		s, err := parseSource(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		host := ""
		if s.host != nil {
			host = s.host.String()
		}
		if s.scheme != c.scheme || s.vm != c.vm || host != c.host {
			t.Errorf("%s: scheme %q, host %q, vm %q", c.in, s.scheme, host, s.vm)
		}
	}
	var u usageError
	for _, in := range []string{"kvm://", "kvm:///web01", "kvm:///system/a/b", "http://x/y", "kvm:///system/%zz", "kvm://user:pw@h/system/x", "hyperv://u:pw@h/x", "hyperv://h/x"} {
		if _, err := parseSource(in); !errors.As(err, &u) {
			t.Errorf("%s: %v, want a usage error", in, err)
		}
	}
	if _, err := parseSource("vsphere://host/vm"); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("vsphere: %v", err)
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "65536": 65536, "64K": 65536, "64k": 65536, "64KiB": 65536, "10G": 10 << 30, "1T": 1 << 40, "7EiB": 7 << 60} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%s: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "K", "-1", "8E", "1.5G", "12 apples", "99999999999999999999"} {
		if n, err := parseSize(in); err == nil {
			t.Errorf("%q is taken for %d", in, n)
		}
	}
}

func TestExitCodesOfSeveralThings(t *testing.T) {
	for _, c := range []struct{ a, b, want int }{
		{exitDone, exitWarnings, exitWarnings},
		{exitWarnings, exitRefused, exitRefused},
		{exitRefused, exitFailed, exitFailed},
		{exitFailed, exitCorrupt, exitCorrupt},
		{exitDone, exitDone, exitDone},
	} {
		if got := worse(c.a, c.b); got != c.want {
			t.Errorf("worse(%d, %d) = %d, want %d", c.a, c.b, got, c.want)
		}
		if got := worse(c.b, c.a); got != c.want {
			t.Errorf("worse(%d, %d) = %d, want %d", c.b, c.a, got, c.want)
		}
	}
}
