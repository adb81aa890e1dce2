package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// history writes a directory as it is after the given number of records.
func history(t *testing.T, records int) (dir string, log, data []byte) {
	t.Helper()
	data = make([]byte, blocks*blockBytes)
	for seq := 1; seq <= records; seq++ {
		e := next(uint64(seq))
		log = append(log, e.line()...)
		copy(data[int(e.block)*blockBytes:], e.content())
	}
	return t.TempDir(), log, data
}

// The judge of every restored guest: what it forgives and what it does not.
func TestVerify(t *testing.T) {
	const records = 2000 // so that blocks were written more than once
	last := next(records)
	// The newest record of some block that is not the last of all.
	var older entry
	for seq := uint64(records - 1); older.seq == 0; seq-- {
		if e := next(seq); e.block != last.block {
			older = e
		}
	}
	at := func(e entry) int { return int(e.block) * blockBytes }
	for _, test := range []struct {
		name   string
		damage func(log, data []byte) ([]byte, []byte)
		mark   bool
		want   string // "" for an error
	}{
		{"as written", nil, false, "crash-consistent records 2000"},
		{"as written, quiesced", nil, true, "app-consistent records 2000"},
		{"last block still empty", func(l, d []byte) ([]byte, []byte) { return l, zero(d, at(last)) }, false, ""},
		{"last block half written", func(l, d []byte) ([]byte, []byte) { d[at(last)+100] ^= 1; return l, d }, false, "crash-consistent records 2000"},
		{"last block half written, quiesced", func(l, d []byte) ([]byte, []byte) { d[at(last)+100] ^= 1; return l, d }, true, ""},
		{"one bit of an older block", func(l, d []byte) ([]byte, []byte) { d[at(older)+3000] ^= 4; return l, d }, false, ""},
		{"an older block still empty", func(l, d []byte) ([]byte, []byte) { return l, zero(d, at(older)) }, false, ""},
		{"block of the future", func(l, d []byte) ([]byte, []byte) { return l[:len(l)-10*lineBytes], d }, false, ""},
		{"a torn line", func(l, d []byte) ([]byte, []byte) { return append(l, "00000000"...), d }, false, "crash-consistent records 2000"},
		{"a torn line, quiesced", func(l, d []byte) ([]byte, []byte) { return append(l, "00000000"...), d }, true, ""},
		{"a line of zeros at the end", func(l, d []byte) ([]byte, []byte) { return append(l, make([]byte, lineBytes)...), d }, false, "crash-consistent records 2000"},
		{"a line of zeros within", func(l, d []byte) ([]byte, []byte) { return zeroLine(l, 7), d }, false, ""},
		{"a line is missing", func(l, d []byte) ([]byte, []byte) { return append(l[:640:640], l[704:]...), d }, false, ""},
		{"blocks cut short", func(l, d []byte) ([]byte, []byte) { return l, d[:len(d)-1] }, false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, log, data := history(t, records)
			if test.damage != nil {
				log, data = test.damage(log, data)
			}
			write(t, dir, logName, log)
			write(t, dir, blockName, data)
			if test.mark {
				write(t, dir, markName, nil)
			}
			r, err := verify(dir)
			switch {
			case test.want == "" && err == nil:
				t.Errorf("forgiven: %s", r)
			case test.want != "" && err != nil:
				t.Error(err)
			case err == nil && r.String() != test.want:
				t.Errorf("got %q, want %q", r, test.want)
			}
		})
	}
}

// The block before the last write of the last record is forgiven, since that
// write may not have happened.
func TestVerifyForgivesTheLastWrite(t *testing.T) {
	dir, log, data := history(t, 2000)
	write(t, dir, blockName, data)
	write(t, dir, logName, append(log, next(2001).line()...))
	r, err := verify(dir)
	if err != nil || !r.lagging || r.last != 2001 {
		t.Errorf("got %+v, %v", r, err)
	}
	write(t, dir, markName, nil)
	if r, err := verify(dir); err == nil {
		t.Errorf("forgiven although quiesced: %s", r)
	}
}

func TestVerifyOfNothing(t *testing.T) {
	r, err := verify(t.TempDir())
	if err != nil || r.state != "new" {
		t.Errorf("got %+v, %v", r, err)
	}
}

// Content that fill wrote is known again, to the byte.
func TestFillAndCheck(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int64{1, blockBytes, blockBytes + 1, 100_000} {
		if err := fill(dir, size, size); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := check(dir); err != nil || n != 1+blockBytes+blockBytes+1+100_000 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	name := filepath.Join(dir, "fill-100000-0")
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	data[99_999] ^= 1
	write(t, dir, "fill-100000-0", data)
	if _, err := check(dir); err == nil || !strings.Contains(err.Error(), "fill-100000-0") {
		t.Errorf("a changed byte gives %v", err)
	}
}

func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func zero(data []byte, at int) []byte {
	clear(data[at : at+blockBytes])
	return data
}

func zeroLine(log []byte, n int) []byte {
	clear(log[n*lineBytes:][:lineBytes])
	return log
}
