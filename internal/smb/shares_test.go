package smb

import (
	"errors"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/winpath"
)

func TestShares(t *testing.T) {
	const volume = `\\?\Volume{0f4ab9d1-7c2e-4b0e-9d0e-5d1f2a3b4c5d}`
	for _, c := range []struct {
		given      []string
		path, want string
	}{
		{nil, `C:\vm\disk.vhdx`, `C$\vm\disk.vhdx`},
		{nil, `d:\disk.vhdx`, `D$\disk.vhdx`},
		{nil, `C:\ClusterStorage\Volume1\vm\disk.vhdx`, `C$\ClusterStorage\Volume1\vm\disk.vhdx`},
		{nil, `\\HV1\vms\disk.vhdx`, `vms\disk.vhdx`},
		{nil, `\\hv1.lab.example\vms\disk.vhdx`, `vms\disk.vhdx`},
		{nil, `\\10.0.0.5\vms\disk.vhdx`, `vms\disk.vhdx`},
		{nil, `\\10\vms\disk.vhdx`, ""},
		{nil, `\\other\vms\disk.vhdx`, ""},
		{nil, volume + `\disk.vhdx`, ""},
		{[]string{`C:\VMs=vms`}, `c:\vms\web01\disk.vhdx`, `vms\web01\disk.vhdx`},
		{[]string{`C:\VMs=vms`}, `C:\VMs2\disk.vhdx`, ""},
		{[]string{`C:\VMs=vms`}, `D:\disk.vhdx`, ""},
		{[]string{`C:\VMs=vms`, `C:\VMs\gold=gold`}, `C:\VMs\gold\base.vhdx`, `gold\base.vhdx`},
		{[]string{`C:\VMs\gold=gold`, `C:\VMs=vms`}, `C:\VMs\gold\base.vhdx`, `gold\base.vhdx`},
		{[]string{volume + `\=vol`}, volume + `\vm\disk.vhdx`, `vol\vm\disk.vhdx`},
		{[]string{`\\other\vms=vms`}, `\\other\vms\disk.vhdx`, `vms\disk.vhdx`},
	} {
		s := NewShares("hv1.lab.example", "10.0.0.5")
		for _, word := range c.given {
			if err := s.Add(word); err != nil {
				t.Fatal(err)
			}
		}
		p, err := winpath.Parse(c.path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Find(p)
		if c.want == "" {
			if !errors.Is(err, fault.ErrUnsupported) {
				t.Errorf("%s with %q: %s, %v", p, c.given, got, err)
			}
		} else if err != nil || got.String() != c.want {
			t.Errorf("%s with %q: %s, %v, want %s", p, c.given, got, err, c.want)
		}
	}
}

func TestSharesThatAreNone(t *testing.T) {
	for _, word := range []string{``, `C:\VMs`, `=vms`, `VMs=vms`, `C:\VMs=`, `C:\VMs=..`, `C:\VMs=IPC$`, `C:\VMs=a\b`, `C:\VMs\..=vms`, `C:\VMs=a:b`} {
		if err := NewShares("hv1").Add(word); err == nil {
			t.Errorf("%q was taken", word)
		}
	}
}

// Whatever a host or an image calls its files, what leaves for the host is the
// name of one file in one share.
func FuzzFind(f *testing.F) {
	f.Add(`C:\vm\disk.vhdx`)
	f.Add(`\\hv1\vms\..\disk.vhdx`)
	f.Fuzz(func(t *testing.T, name string) {
		p, err := winpath.Parse(name)
		if err != nil {
			return
		}
		if found, err := NewShares("hv1").Find(p); err == nil {
			if err := found.check(); err != nil {
				t.Fatalf("%q became %q: %v", name, found, err)
			}
		}
	})
}
