package winpath

import (
	"errors"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const volume = `\\?\Volume{0f4ab9d1-7c2e-4b0e-9d0e-5d1f2a3b4c5d}`
	for _, c := range []struct{ name, want string }{
		{`C:\vm\disk.vhdx`, `C:\vm\disk.vhdx`},
		{`c:/vm/disk.vhdx`, `c:\vm\disk.vhdx`},
		{`C:\vm\\disk.vhdx\`, `C:\vm\disk.vhdx`},
		{`C:\`, `C:\`},
		{`\\?\C:\vm\disk.vhdx`, `C:\vm\disk.vhdx`},
		{`\\server\share\disk.vhdx`, `\\server\share\disk.vhdx`},
		{`\\?\UNC\server\share\disk.vhdx`, `\\server\share\disk.vhdx`},
		{`\\server\C$`, `\\server\C$\`},
		{volume + `\vm\disk.vhdx`, volume + `\vm\disk.vhdx`},
		{`C:\ClusterStorage\Volume 1\Größe.vhdx`, `C:\ClusterStorage\Volume 1\Größe.vhdx`},
		{`C:\vm\comfort\nullable.vhdx`, `C:\vm\comfort\nullable.vhdx`},

		{``, ""},
		{`disk.vhdx`, ""},
		{`\vm\disk.vhdx`, ""},
		{`C:disk.vhdx`, ""},
		{`C:`, ""},
		{`1:\disk.vhdx`, ""},
		{`C:\vm\..\disk.vhdx`, ""},
		{`C:\vm\.\disk.vhdx`, ""},
		{`C:\vm\disk.vhdx:stream`, ""},
		{`C:\vm\disk.vhdx::$DATA`, ""},
		{`C:\vm\C:\disk.vhdx`, ""},
		{`C:\vm\NUL`, ""},
		{`C:\vm\con.vhdx`, ""},
		{`C:\aux \disk.vhdx`, ""},
		{`C:\vm\COM1.vhdx`, ""},
		{`C:\vm\lpt².vhdx`, ""},
		{`C:\vm\CONIN$`, ""},
		{`C:\vm.\disk.vhdx`, ""},
		{`C:\vm \disk.vhdx`, ""},
		{`C:\vm\di*k.vhdx`, ""},
		{"C:\\vm\\disk\x00.vhdx", ""},
		{"C:\\vm\\disk\xff.vhdx", ""},
		{`\\.\PhysicalDrive0`, ""},
		{`//./PhysicalDrive0`, ""},
		{`\\?\GLOBALROOT\Device\HarddiskVolume1\x`, ""},
		{`\\?\Volume{1234}\x`, ""},
		{`\\server`, ""},
		{`\\server\`, ""},
		{`\\server\IPC$\pipe`, ""},
		{`\\..\share\x`, ""},
		{`C:\` + strings.Repeat("a", 256), ""},
		{`C:\` + strings.Repeat(`a\`, 20000), ""},
	} {
		p, err := Parse(c.name)
		if c.want == "" {
			if !errors.Is(err, ErrName) {
				t.Errorf("%q gave %q, %v", c.name, p, err)
			}
		} else if err != nil || p.String() != c.want {
			t.Errorf("%q gave %q, %v, want %q", c.name, p, err, c.want)
		}
	}
}

func TestJoinStaysBelowTheRoot(t *testing.T) {
	dir, err := Parse(`C:\vm\web01`)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, want string }{
		{`.\base.vhdx`, `C:\vm\web01\base.vhdx`},
		{`base.vhdx`, `C:\vm\web01\base.vhdx`},
		{`..\golden\base.vhdx`, `C:\vm\golden\base.vhdx`},
		{`../../base.vhdx`, `C:\base.vhdx`},
		{`..\..\..\base.vhdx`, ""},
		{`\base.vhdx`, ""},
		{`C:\base.vhdx`, ""},
		{`C:base.vhdx`, ""},
		{`\\server\share\base.vhdx`, ""},
		{`.\base.vhdx:x`, ""},
		{`NUL`, ""},
	} {
		p, err := dir.Join(c.name)
		if c.want == "" {
			if !errors.Is(err, ErrName) {
				t.Errorf("%q gave %q, %v", c.name, p, err)
			}
		} else if err != nil || p.String() != c.want {
			t.Errorf("%q gave %q, %v, want %q", c.name, p, err, c.want)
		}
	}
}

func TestUnder(t *testing.T) {
	for _, c := range []struct {
		path, dir, rest string
		ok              bool
	}{
		{`C:\VM\disk.vhdx`, `c:\vm`, `disk.vhdx`, true},
		{`C:\vm`, `C:\vm`, "", true},
		{`C:\vms\disk.vhdx`, `C:\vm`, "", false},
		{`D:\vm\disk.vhdx`, `C:\vm`, "", false},
		{`C:\vm`, `C:\vm\web01`, "", false},
		{`\\HOST\vm\a\b`, `\\host\VM`, `a\b`, true},
		{`\\host\vm2\a`, `\\host\vm`, "", false},
	} {
		p, err := Parse(c.path)
		dir, err2 := Parse(c.dir)
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		if rest, ok := p.Under(dir); rest != c.rest || ok != c.ok {
			t.Errorf("%s under %s: %q, %v", p, dir, rest, ok)
		}
	}
}

// Names come from images and hosts. Whatever they are, a path that is taken
// means the same when it is written out and read again, and holds nothing that
// leads elsewhere.
func FuzzPath(f *testing.F) {
	for _, s := range []string{`C:\vm\disk.vhdx`, `\\?\UNC\a\b\c`, `..\x`, `\\?\Volume{0f4ab9d1-7c2e-4b0e-9d0e-5d1f2a3b4c5d}\x`, `//./x`, `C:\COM1 .x`} {
		f.Add(s)
	}
	dir, err := Parse(`C:\vm\web01`)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name string) {
		p, err := Parse(name)
		if err != nil {
			if p, err = dir.Join(name); err != nil {
				return
			}
			if p.Root() != dir.Root() {
				t.Fatalf("%q leads from %s to %s", name, dir, p)
			}
		}
		again, err := Parse(p.String())
		if err != nil || again.String() != p.String() {
			t.Fatalf("%q gave %q, and that %q, %v", name, p, again, err)
		}
		if below := p.Below(); strings.ContainsAny(below, ":/*?\x00") || strings.Contains(`\`+below+`\`, `\..\`) || strings.Contains(`\`+below+`\`, `\.\`) {
			t.Fatalf("%q gave %q", name, below)
		}
		if rest, ok := p.Under(p.Dir()); !ok || rest != p.Base() {
			t.Fatalf("%q under its directory: %q, %v", p, rest, ok)
		}
	})
}
