package extent

import (
	"testing"

	"pgregory.net/rapid"
)

const disk = 64

// A bitmap of a tiny disk is the model that every operation must agree with.
type model [disk]bool

func modelOf(s Set) (m model) {
	for _, e := range s.List() {
		for i := e.Off; i < e.End(); i++ {
			m[i] = true
		}
	}
	return m
}

func extents(t *rapid.T, name string) []Extent {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Extent {
		off := rapid.Int64Range(0, disk-1).Draw(t, "off")
		return Extent{off, rapid.Int64Range(0, disk-off).Draw(t, "len")}
	}), 0, 12).Draw(t, name)
}

func TestSetAgreesWithABitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		as, bs := extents(t, "a"), extents(t, "b")
		a, b := NewSet(as...), NewSet(bs...)
		var want model
		for _, e := range as {
			for i := e.Off; i < e.End(); i++ {
				want[i] = true
			}
		}
		if modelOf(a) != want {
			t.Fatalf("Add of %v gave %v", as, a)
		}
		win := Extent{8, 24}
		ma, mb := modelOf(a), modelOf(b)
		var union, minus, within model
		var n int64
		for i := range disk {
			union[i] = ma[i] || mb[i]
			minus[i] = ma[i] && !mb[i]
			within[i] = ma[i] && int64(i) >= win.Off && int64(i) < win.End()
			if ma[i] {
				n++
			}
		}
		for _, c := range []struct {
			op   string
			got  Set
			want model
		}{{"union", a.Union(b), union}, {"subtract", a.Subtract(b), minus}, {"within", a.Within(win), within}} {
			if modelOf(c.got) != c.want {
				t.Errorf("%s of %v and %v gave %v", c.op, a, b, c.got)
			}
			for i, l := 1, c.got.List(); i < len(l); i++ {
				if l[i-1].End() >= l[i].Off {
					t.Errorf("%s: %v and %v overlap or touch", c.op, l[i-1], l[i])
				}
			}
		}
		if a.Bytes() != n {
			t.Errorf("%v counts %d bytes, want %d", a, a.Bytes(), n)
		}
	})
}

func TestAlign(t *testing.T) {
	for _, c := range []struct {
		name     string
		in, want Extent
	}{
		{"empty stays empty", Extent{5, 0}, Extent{5, 0}},
		{"inside one unit", Extent{5, 1}, Extent{0, 8}},
		{"exactly one unit", Extent{8, 8}, Extent{8, 8}},
		{"across two", Extent{7, 2}, Extent{0, 16}},
		{"cut at the end of the disk", Extent{17, 2}, Extent{16, 3}},
	} {
		if got := c.in.Align(8, 19); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if !NewSet(Extent{8, 8}).Contains(Extent{9, 7}) || NewSet(Extent{8, 8}).Contains(Extent{9, 8}) {
		t.Error("Contains is wrong")
	}
}
