package vhdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

var testLog = mustGUID("11111111-2222-3333-4444-555555555555")

// A logChange is one descriptor: a page, or zeros where page is nil.
type logChange struct {
	off, bytes int64
	page       []byte
}

// logEntry is an entry as it lies in the log.
type logEntry struct {
	at, tail  int64
	sequence  uint64
	flushed   int64
	fileBytes int64
	changes   []logChange
}

func (e logEntry) encode() []byte {
	le := binary.LittleEndian
	p := make([]byte, (entryHeader+logDescriptor*len(e.changes)+logSector-1)/logSector*logSector)
	for i, c := range e.changes {
		d := p[entryHeader+logDescriptor*i:]
		le.PutUint64(d[16:], uint64(c.off))
		le.PutUint64(d[24:], e.sequence)
		if c.page == nil {
			copy(d, "zero")
			le.PutUint64(d[8:], uint64(c.bytes))
			continue
		}
		copy(d, "desc")
		copy(d[4:8], c.page[logSector-4:])
		copy(d[8:16], c.page)
		s := slices.Clone(c.page)
		copy(s, "data")
		le.PutUint32(s[4:], uint32(e.sequence>>32))
		le.PutUint32(s[logSector-4:], uint32(e.sequence))
		p = append(p, s...)
	}
	copy(p, "loge")
	le.PutUint32(p[8:], uint32(len(p)))
	le.PutUint32(p[12:], uint32(e.tail))
	le.PutUint64(p[16:], e.sequence)
	le.PutUint32(p[24:], uint32(len(e.changes)))
	copy(p[32:], testLog[:])
	le.PutUint64(p[48:], uint64(e.flushed))
	le.PutUint64(p[56:], uint64(e.fileBytes))
	le.PutUint32(p[4:], checksum(p))
	return p
}

// log writes an entry into m's ring and gives the place behind it.
func (m memory) log(e logEntry) int64 {
	p := e.encode()
	for i := range p {
		m[logOffset+(e.at+int64(i))%mib] = p[i]
	}
	return (e.at + int64(len(p))) % mib
}

// dirty makes m's headers say that the log must be replayed.
func (m memory) dirty() {
	copy(m[header1+48:], testLog[:])
	copy(m[header2+48:], testLog[:])
	m.seal()
}

func page(fill byte) []byte { return bytes.Repeat([]byte{fill}, logSector) }

// blockOf is where block n of the image in m lies.
func blockOf(m memory, n int64) int64 {
	return int64(binary.LittleEndian.Uint64(m[tableOffset+8*n:])) &^ (mib - 1)
}

func TestReplay(t *testing.T) {
	base := file(t, image.CreateOptions{})
	end := int64(len(base))
	at := blockOf(base, 0)
	whole := func(at, tail int64, seq uint64, changes ...logChange) logEntry {
		return logEntry{at, tail, seq, end, end, changes}
	}
	for _, c := range []struct {
		name  string
		write func(m memory)
		want  func(p []byte) // what the replay makes of the disk
		err   error
	}{
		{"a log that was opened and never written", func(m memory) {}, nil, nil},
		{"an empty entry", func(m memory) { m.log(whole(0, 0, 1)) }, nil, nil},
		{"a page", func(m memory) { m.log(whole(0, 0, 7, logChange{off: at, page: page(9)})) },
			func(p []byte) { copy(p, page(9)) }, nil},
		{"zeros", func(m memory) { m.log(whole(0, 0, 7, logChange{off: at + 4096, bytes: 4096})) },
			func(p []byte) { clear(p[4096:8192]) }, nil},
		{"zeros of 2^62 bytes", func(m memory) { m.log(whole(0, 0, 7, logChange{off: at, bytes: 1<<62 - 1<<40})) },
			func(p []byte) { clear(p) }, nil},
		{"a page over zeros over a page", func(m memory) {
			m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}, logChange{off: at, bytes: 8192}, logChange{off: at + 4096, page: page(8)}))
		}, func(p []byte) { clear(p[:4096]); copy(p[4096:], page(8)) }, nil},
		{"two entries", func(m memory) {
			n := m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m.log(whole(n, 0, 8, logChange{off: at, page: page(8)}))
		}, func(p []byte) { copy(p, page(8)) }, nil},
		{"the tail leaves the first of two out", func(m memory) {
			n := m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m.log(whole(n, n, 8, logChange{off: at + 4096, page: page(8)}))
		}, func(p []byte) { copy(p[4096:], page(8)) }, nil},
		{"around the ring's end", func(m memory) {
			n := m.log(whole(mib-12288, mib-12288, 7, logChange{off: at, page: page(9)}))
			m.log(whole(n, mib-12288, 8, logChange{off: at + 4096, page: page(8)}))
		}, func(p []byte) { copy(p, page(9)); copy(p[4096:], page(8)) }, nil},
		{"an entry around the ring's end", func(m memory) {
			m.log(whole(mib-4096, mib-4096, 7, logChange{off: at, page: page(9)}))
		}, func(p []byte) { copy(p, page(9)) }, nil},
		{"a torn last entry", func(m memory) {
			n := m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m.log(whole(n, 0, 8, logChange{off: at, page: page(8)}))
			m[logOffset+n+5000]++
		}, func(p []byte) { copy(p, page(9)) }, nil},
		{"a gap in the sequence", func(m memory) {
			n := m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m.log(whole(n, n, 9, logChange{off: at + 4096, page: page(8)}))
		}, func(p []byte) { copy(p[4096:], page(8)) }, nil},
		{"an older sequence behind", func(m memory) {
			n := m.log(whole(0, 0, 70, logChange{off: at, page: page(9)}))
			m.log(whole(n, n, 8, logChange{off: at, page: page(8)}))
		}, func(p []byte) { copy(p, page(9)) }, nil},
		{"the log of another session", func(m memory) {
			n := m.log(whole(0, 0, 70, logChange{off: at, page: page(9)}))
			m[logOffset+32]++
			m.log(whole(n, n, 8, logChange{off: at, page: page(8)}))
		}, func(p []byte) { copy(p, page(8)) }, nil},
		{"a block that only the log knows", func(m memory) {
			p := slices.Clone([]byte(m[tableOffset : tableOffset+4096]))
			binary.LittleEndian.PutUint64(p[8:], uint64(end)|statePresent)
			e := whole(0, 0, 7, logChange{off: tableOffset, page: p}, logChange{off: end, page: page(5)})
			e.fileBytes = end + 2<<20
			m.log(e)
		}, func(p []byte) { copy(p[2<<20:], page(5)) }, nil},
		{"a region table that only the log has right", func(m memory) {
			var list []logChange
			for off := int64(regions1); off < regions1+regionBytes; off += logSector {
				list = append(list, logChange{off: off, page: slices.Clone(m[off : off+logSector])})
			}
			m.log(whole(0, 0, 7, list...))
			m.region(0, tableOffset, 2*mib) // into the first block
		}, nil, nil},

		{"the tail in no entry", func(m memory) { m.log(whole(0, 4096, 7, logChange{off: at, page: page(9)})) }, nil, fault.ErrCorrupt},
		{"the only entry torn", func(m memory) { m.log(whole(0, 0, 7)); m[logOffset+3000]++ }, nil, fault.ErrCorrupt},
		{"an entry of 0 bytes", func(m memory) { m.log(whole(0, 0, 7)); m.put32(logOffset+8, 0) }, nil, fault.ErrCorrupt},
		{"an entry larger than the ring", func(m memory) { m.log(whole(0, 0, 7)); m.put32(logOffset+8, 2<<20) }, nil, fault.ErrCorrupt},
		{"sequence number 0", func(m memory) { m.log(whole(0, 0, 0)) }, nil, fault.ErrCorrupt},
		{"a file shorter than the log knows", func(m memory) {
			e := whole(0, 0, 7)
			e.flushed = end + 1
			m.log(e)
		}, nil, fault.ErrCorrupt},
		{"a page off its place", func(m memory) { m.log(whole(0, 0, 7, logChange{off: at + 512, page: page(9)})) }, nil, fault.ErrCorrupt},
		{"zeros of odd length", func(m memory) { m.log(whole(0, 0, 7, logChange{off: at, bytes: 512})) }, nil, fault.ErrCorrupt},
		{"zeros behind 2^63", func(m memory) { m.log(whole(0, 0, 7, logChange{off: 1<<62 + 1<<61, bytes: 1<<62 + 1<<61})) }, nil, fault.ErrCorrupt},
		{"a data sector of another entry", func(m memory) {
			m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m[logOffset+4096+4]++
			m.put32(logOffset+4, checksum(m[logOffset:logOffset+8192]))
		}, nil, fault.ErrCorrupt},
		{"more descriptors than the entry holds", func(m memory) {
			m.log(whole(0, 0, 7))
			m.put32(logOffset+24, 1000)
			m.put32(logOffset+4, checksum(m[logOffset:logOffset+4096]))
		}, nil, fault.ErrCorrupt},
		{"more pages than the entry holds", func(m memory) {
			m.log(whole(0, 0, 7, logChange{off: at, page: page(9)}))
			m.put32(logOffset+8, 4096)
			m.put32(logOffset+4, checksum(m[logOffset:logOffset+4096]))
		}, nil, fault.ErrCorrupt},
		{"a descriptor of no kind", func(m memory) {
			m.log(whole(0, 0, 7, logChange{off: at, bytes: 4096}))
			m[logOffset+entryHeader] = 'x'
			m.put32(logOffset+4, checksum(m[logOffset:logOffset+4096]))
		}, nil, fault.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := slices.Clone(base)
			c.write(m)
			m.dirty()
			before := slices.Clone(m)
			img, err := OpenLayer(m)
			if !errors.Is(err, c.err) {
				t.Fatalf("%v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			want := make([]byte, 8<<20)
			openMemory(t, base).ReadAt(want, 0)
			if c.want != nil {
				c.want(want)
			}
			imagetest.Reader(t, img, bytes.NewReader(want))
			if !strings.Contains(strings.Join(img.Info().Warnings, " "), "dirty log") {
				t.Errorf("warnings %q", img.Info().Warnings)
			}
			if !bytes.Equal(before, m) {
				t.Error("the file was changed")
			}
			if !qemuDiffers[c.name] {
				qemuReplays(t, m, want)
			}
		})
	}
}

// qemuDiffers names what qemu-img 7.2 replays in another way than the
// specification says.
var qemuDiffers = map[string]bool{
	// It starts at the sequence's first entry, not at the tail. Entries before
	// the tail are in their places already, so in files as they are made that
	// is the same.
	"the tail leaves the first of two out": true,
	// It does not compare the second entry's number with the first's.
	"a gap in the sequence":    true,
	"an older sequence behind": true,
	// It makes the file longer only where its new length is no whole MiB.
	"a block that only the log knows": true,
	// It reads the region tables before the log.
	"a region table that only the log has right": true,
	// It would write that many.
	"zeros of 2^62 bytes": true,
}

// qemuReplays lets qemu-img replay the log of a copy.
func qemuReplays(t *testing.T, m memory, want []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dirty.vhdx")
	if err := os.WriteFile(path, m, 0o600); err != nil {
		t.Fatal(err)
	}
	imagetest.Qemu(t, "check", "-f", "vhdx", "-r", "all", path)
	got := make([]byte, len(want))
	if _, err := imagetest.QemuRaw(t, path, "vhdx").ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("qemu-img's replay gives another content")
	}
}

// However many entries overlap, a read sees what writing them one after the
// other would have made.
func TestReplayIsWritingInOrder(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		const length = 64 * logSector
		plain := make(memory, length+16*logSector)
		for i := range length {
			plain[i] = byte(r.Uint32())
		}
		plain = plain[:length]
		want := slices.Clone([]byte(plain))
		var list []piece
		var pages memory // data sectors, behind the file proper
		for range r.IntN(60) {
			c := piece{off: r.Int64N(64) * logSector, bytes: logSector}
			if r.IntN(3) == 0 {
				c.zero, c.bytes = true, min((1+r.Int64N(20))*logSector, length-c.off)
				clear(want[c.off : c.off+c.bytes])
			} else {
				p := page(byte(r.Uint32()))
				c.sector = length + int64(len(pages))
				c.lead, c.trail = [8]byte(p), [4]byte(p)
				pages = append(pages, p...)
				copy(want[c.off:], p)
			}
			list = append(list, c)
		}
		f := &replayed{file: append(plain, pages...), bytes: length, pieces: flatten(list)}
		got := make([]byte, length)
		for off := 0; off < length; {
			n := min(1+r.IntN(30000), length-off)
			if m, err := f.ReadAt(got[off:off+n], int64(off)); m != n || err != nil && err != io.EOF {
				t.Fatalf("seed %d: read %d of %d: %v", seed, m, n, err)
			}
			off += n
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d: another content after %d changes", seed, len(list))
		}
	}
}

// A log whose entries all overlap, or that is nothing but zeros to write,
// costs neither much time nor much memory.
func TestHostileAmplification(t *testing.T) {
	base := file(t, image.CreateOptions{})
	m := slices.Clone(base)
	for at := int64(0); at < mib; at += logSector { // headers that each claim the whole ring
		e := logEntry{at: at, sequence: 1 + uint64(at), flushed: 0}.encode()
		binary.LittleEndian.PutUint32(e[8:], mib)
		copy(m[logOffset+at:], e)
	}
	m.dirty()
	if err := imagetest.Hostile(t, func() (image.Image, error) { return OpenLayer(m) }); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("entries that overlap: %v", err)
	}
	m = slices.Clone(base)
	var list []logChange
	for i := range int64(30000) {
		list = append(list, logChange{off: 1<<40 + i*logSector, bytes: 1 << 50})
	}
	m.log(logEntry{at: 0, sequence: 1, fileBytes: 1 << 60, changes: list})
	m.dirty()
	if err := imagetest.Hostile(t, func() (image.Image, error) { return OpenLayer(m) }); err != nil {
		t.Errorf("30000 zeros: %v", err)
	}
	for range 3000 {
		list = append(list, logChange{off: 1 << 40, bytes: 1 << 50})
	}
	m = append(slices.Clone(base), make([]byte, 2*mib)...) // a log that has room for more
	for _, h := range []int64{header1, header2} {
		m.put64(h+72, uint64(len(base)))
		m.put32(h+68, 2*mib)
	}
	copy(m[len(base):], logEntry{at: 0, sequence: 1, fileBytes: 1 << 60, changes: list}.encode())
	m.dirty()
	if err := imagetest.Hostile(t, func() (image.Image, error) { return OpenLayer(m) }); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("33000 zeros: %v", err)
	}
}

// A dirty log on a share is searched by few reads: each is a round trip.
func TestLogIsSearchedInLargePieces(t *testing.T) {
	m := file(t, image.CreateOptions{})
	at := blockOf(m, 0)
	end := int64(len(m))
	m.log(logEntry{512 << 10, 512 << 10, 7, end, end, []logChange{{off: at, page: page(9)}}})
	m.dirty()
	f := &counted{File: m}
	img, err := Open(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, logSector)
	if _, err := img.ReadAt(got, 0); err != nil || got[100] != 9 {
		t.Errorf("the log was not replayed: %d, %v", got[100], err)
	}
	if f.reads > 40 {
		t.Errorf("%d reads, want at most 40", f.reads)
	}
}

// counted counts how often a file is read.
type counted struct {
	image.File
	reads int
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	return c.File.ReadAt(p, off)
}
