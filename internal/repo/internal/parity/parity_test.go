package parity

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

var repo = [16]byte(vectors.Fill(0, 16))

// noise is n bytes that depend on seed alone.
func noise(seed uint64, n int64) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
	return b
}

func mustEncode(t testing.TB, object []byte) []byte {
	t.Helper()
	b, err := Encode(repo, seal.Hash(object), bytes.NewReader(object), int64(len(object)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestVectors(t *testing.T) {
	v := struct {
		Repo, Object, Parity vectors.Hex
		// Of a longer object only the hash of its parity: it is bytes 0 to 250,
		// over and over.
		LongBytes int64
		LongHash  vectors.Hex
	}{Repo: repo[:], Object: vectors.Fill(7, 200), LongBytes: 300_001}
	long := make([]byte, v.LongBytes)
	for i := range long {
		long[i] = byte(i % 251)
	}
	sum := seal.Hash(mustEncode(t, long))
	v.Parity, v.LongHash = mustEncode(t, v.Object), sum[:]
	vectors.Load(t, "parity", &v)
	if got := mustEncode(t, v.Object); !bytes.Equal(got, v.Parity) {
		t.Errorf("parity %x", got)
	}
	if !bytes.Equal(sum[:], v.LongHash) {
		t.Errorf("long parity has hash %x", sum)
	}
}

// times multiplies in the field of the specification, the slow way.
func times(a, b byte) (p byte) {
	for ; b > 0; b >>= 1 {
		if b&1 == 1 {
			p ^= a
		}
		carry := a&0x80 != 0
		if a <<= 1; carry {
			a ^= 0x1d
		}
	}
	return p
}

// The code is the one that the page describes, computed without the library.
func TestRowsAreAsSpecified(t *testing.T) {
	for _, size := range []int64{1, 100, 4096, 4097, 64 * 4096, 64*4096 + 1, 1_000_003} {
		object := noise(uint64(size), size)
		b := mustEncode(t, object)
		if int64(len(b)) != Bytes(size) {
			t.Fatalf("%d bytes of parity for %d, want %d", len(b), size, Bytes(size))
		}
		d := layout(size)
		if d.row*dataRows < size || size > 4096 && d.row%4096 != 0 {
			t.Fatalf("rows of %d bytes for %d", d.row, size)
		}
		for x := int64(0); x < d.row; x += 1 + d.row/500 {
			var sum, powers byte
			weight := byte(1)
			for i := range int64(dataRows) {
				if off := i*d.row + x; off < size {
					sum ^= object[off]
					powers ^= times(object[off], weight)
				}
				weight = times(weight, 2)
			}
			if b[d.rowOff(64)+x] != sum || b[d.rowOff(65)+x] != powers {
				t.Fatalf("size %d, byte %d of the rows: %x %x, want %x %x", size, x, b[d.rowOff(64)+x], b[d.rowOff(65)+x], sum, powers)
			}
		}
	}
}

// segments is a source in memory of which only so much lies together.
type segments struct {
	*bytes.Reader
	b   []byte
	seg int64
}

func (s segments) View(off, n int64) []byte {
	if off/s.seg != (off+n-1)/s.seg {
		return nil
	}
	return s.b[off:][:n:n]
}

// What lies in memory is not copied, and its parity is the same.
func TestEncodeOfALender(t *testing.T) {
	object := noise(1, 64*4*blockBytes+100)
	want := mustEncode(t, object)
	for _, seg := range []int64{1000, 20_000, 1 << 20} {
		src := segments{bytes.NewReader(object), object, seg}
		got, err := Encode(repo, seal.Hash(object), src, int64(len(object)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("segments of %d: %v", seg, err)
		}
	}
	if !bytes.Equal(object, noise(1, int64(len(object)))) {
		t.Error("the object was written to")
	}
}

// heal heals what is left of object and fails if what Heal says of it is not
// so: what it does not call lost is right.
func heal(t testing.TB, object, left, par []byte) (Result, []byte) {
	t.Helper()
	p, err := Open(repo, par)
	if err != nil {
		t.Fatal(err)
	}
	if p.Size != int64(len(object)) || p.Sum != seal.Hash(object) {
		t.Fatalf("parity of %d bytes, want %d", p.Size, len(object))
	}
	out := make([]byte, p.Size)
	res, err := p.Heal(bytes.NewReader(left), Window(out))
	if err != nil {
		t.Fatal(err)
	}
	if res.Unknown > 0 {
		return res, out
	}
	lost := make([]bool, len(object))
	for i, r := range res.Lost {
		if i > 0 && res.Lost[i-1].Off+res.Lost[i-1].Len >= r.Off {
			t.Fatalf("lost ranges do not ascend: %v", res.Lost)
		}
		for k := r.Off; k < r.Off+r.Len; k++ {
			lost[k] = true
		}
	}
	for i := range object {
		if !lost[i] && out[i] != object[i] {
			t.Fatalf("byte %d is wrong and not called lost: %+v", i, res)
		}
	}
	return res, out
}

func mustHeal(t testing.TB, what string, object, left, par []byte) {
	t.Helper()
	res, out := heal(t, object, left, par)
	if !bytes.Equal(out, object) || len(res.Lost) > 0 || res.Healed != res.Damaged {
		t.Fatalf("%s: not healed: %+v", what, res)
	}
}

// Every run that the specification promises heals, wherever it begins, and
// whether it is noise, zeros or missing.
func TestRunsHeal(t *testing.T) {
	const size = 64*8192 - 777
	object := noise(1, size)
	par := mustEncode(t, object)
	run := HealsRun(size)
	if run != 2*8192-4095 {
		t.Fatalf("a run of %d", run)
	}
	for at := int64(0); at+run <= size; at += 9973 {
		bad := bytes.Clone(object)
		copy(bad[at:], noise(uint64(at)+2, run))
		mustHeal(t, "noise", object, bad, par)
		clear(bad[at : at+run])
		mustHeal(t, "zeros", object, bad, par)
	}
	// Wherever one byte more touches a third block, it is lost, and named.
	bad := bytes.Clone(object)
	for i := int64(4095); i <= 4095+run; i++ {
		bad[i] ^= 0x55
	}
	if res, _ := heal(t, object, bad, par); len(res.Lost) != 3 || res.Healed == 0 {
		t.Errorf("%+v", res)
	}
	mustHeal(t, "cut", object, object[:size-run], par)
	mustHeal(t, "longer", object, append(bytes.Clone(object), "more"...), par)
}

func TestSmallObjectsHealFromNothing(t *testing.T) {
	for _, size := range []int64{1, 500, 4095, 4096, 4097, 8192} {
		object := noise(uint64(size), size)
		if HealsRun(size) != size {
			t.Errorf("of %d bytes a run of %d heals", size, HealsRun(size))
		}
		mustHeal(t, "nothing left", object, nil, mustEncode(t, object))
	}
}

// hurt damages block i of a column, of the object or of its parity, in one of
// several ways.
func hurt(t *rapid.T, d dims, object, par []byte, i, c int64) {
	from, to := i*d.row+c*blockBytes, int64(len(object))
	b := object
	if i >= dataRows {
		from, to, b = d.rowOff(i)+c*blockBytes, int64(len(par)), par
	}
	to = min(to, from+min(blockBytes, d.row-c*blockBytes))
	if from >= to {
		return
	}
	switch rapid.IntRange(0, 2).Draw(t, "how") {
	case 0: // a bit
		b[rapid.Int64Range(from, to-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
	case 1:
		clear(b[from:to])
	default:
		copy(b[from:to], noise(rapid.Uint64().Draw(t, "seed"), to-from))
	}
}

// Up to two of the 66 blocks of each column heal, with one copy of every
// checksum and one header gone as well.
func TestScatteredDamageHeals(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 64*2*blockBytes).Draw(t, "size")
		object := noise(rapid.Uint64().Draw(t, "content"), size)
		d := layout(size)
		bad, par := bytes.Clone(object), encode(t, object)
		for c := range d.cols {
			for range rapid.IntRange(0, 2).Draw(t, "blocks") {
				hurt(t, d, bad, par, rapid.Int64Range(0, rows-1).Draw(t, "row"), c)
			}
			if rapid.Bool().Draw(t, "checksums") {
				table := []int64{headerBytes, d.secondTable()}[rapid.IntRange(0, 1).Draw(t, "table")]
				par[table+c*columnBytes+rapid.Int64Range(0, columnBytes-1).Draw(t, "at")] ^= 4
			}
		}
		if rapid.Bool().Draw(t, "a header") {
			par[[]int64{3, d.secondHeader() + 60}[rapid.IntRange(0, 1).Draw(t, "which")]] ^= 1
		}
		p, err := Open(repo, par)
		if err != nil {
			t.Fatal(err)
		}
		out := make([]byte, size)
		res, err := p.Heal(bytes.NewReader(bad), Window(out))
		if err != nil || !bytes.Equal(out, object) || len(res.Lost) > 0 || res.Unknown > 0 {
			t.Fatalf("not healed: %+v, %v", res, err)
		}
	})
}

// Whatever was done to both, what comes out either has the object's hash or is
// called damaged, and what is not called lost is right.
func TestNeverWrong(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 64*2*blockBytes).Draw(t, "size")
		object := noise(rapid.Uint64().Draw(t, "content"), size)
		d := layout(size)
		bad, par := bytes.Clone(object), encode(t, object)
		for range rapid.IntRange(1, 12).Draw(t, "hurts") {
			hurt(t, d, bad, par, rapid.Int64Range(0, rows-1).Draw(t, "row"), rapid.Int64Range(0, d.cols-1).Draw(t, "column"))
		}
		for range rapid.IntRange(0, 4).Draw(t, "more") {
			par[rapid.IntRange(0, len(par)-1).Draw(t, "at")] ^= 0x40
		}
		bad = bad[:rapid.Int64Range(0, size).Draw(t, "left")]
		par = par[:rapid.IntRange(len(par)/2, len(par)).Draw(t, "parity left")]
		p, err := Open(repo, par)
		if err != nil {
			return
		}
		out := make([]byte, size)
		res, err := p.Heal(bytes.NewReader(bad), Window(out))
		if err != nil {
			t.Fatal(err)
		}
		if right := bytes.Equal(out, object); right != (seal.Hash(out) == p.Sum) || res.Unknown == 0 && right != (len(res.Lost) == 0) {
			t.Fatalf("right: %v, but %+v", right, res)
		}
	})
}

func encode(t *rapid.T, object []byte) []byte {
	b, err := Encode(repo, seal.Hash(object), bytes.NewReader(object), int64(len(object)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestOpenRefuses(t *testing.T) {
	object := noise(1, 9000)
	good := mustEncode(t, object)
	if p, err := Open(repo, good); err != nil || !p.Whole() {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 97 {
		b := bytes.Clone(good)
		b[i] ^= 8
		if p, err := Open(repo, b); err != nil || p.Whole() {
			t.Fatalf("flipped at %d: %v", i, err)
		}
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "half a header": good[:40], "less than half": good[:len(good)/2-1],
		"more than all": append(bytes.Clone(good), 0), "another repository's": good,
	} {
		id := repo
		if name == "another repository's" {
			id[0]++
		}
		if _, err := Open(id, b); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	if _, err := Encode(repo, [32]byte{}, bytes.NewReader(nil), 0); err == nil {
		t.Error("parity of nothing")
	}
}

// Parity comes from stores that nobody trusts. Whatever it says, healing must
// not panic nor take much memory, and nothing is called healed that is not.
func FuzzHeal(f *testing.F) {
	object := noise(1, 9000)
	f.Add(mustEncode(f, object), object[:5000])
	f.Add(mustEncode(f, object[:300]), object[:100])
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, par, left []byte) {
		for _, b := range [][]byte{par, mended(par)} {
			p, err := Open(repo, b)
			if err != nil {
				continue
			}
			if p.Size > 1<<20 {
				continue // the caller's to allow
			}
			out := make([]byte, p.Size)
			res, err := p.Heal(bytes.NewReader(left), Window(out))
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range res.Lost {
				if r.Off < 0 || r.Len < 1 || r.Off+r.Len > p.Size {
					t.Errorf("lost %+v of %d", r, p.Size)
				}
			}
			if res.Healed > res.Damaged {
				t.Errorf("%+v", res)
			}
		}
	})
}

// mended gives par a header whose checksum is right.
func mended(par []byte) []byte {
	b := slices.Clone(par)
	if len(b) < headerBytes {
		return b
	}
	copy(b, magic)
	copy(b[8:], repo[:])
	clear(b[64:76])
	le.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
	return b
}

func BenchmarkEncode(b *testing.B) {
	object := noise(1, 64<<20)
	sum := seal.Hash(object)
	b.SetBytes(int64(len(object)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encode(repo, sum, segments{bytes.NewReader(object), object, 1 << 20}, int64(len(object))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHeal(b *testing.B) {
	object := noise(1, 64<<20)
	par := mustEncode(b, object)
	for _, c := range []struct {
		name string
		hurt func([]byte)
	}{{"sound", func([]byte) {}}, {"a run", func(o []byte) { clear(o[5_000_000:][:HealsRun(64<<20)]) }}} {
		b.Run(c.name, func(b *testing.B) {
			bad := bytes.Clone(object)
			c.hurt(bad)
			out := make([]byte, len(object))
			b.SetBytes(int64(len(object)))
			for b.Loop() {
				p, err := Open(repo, par)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := p.Heal(bytes.NewReader(bad), Window(out)); err != nil {
					b.Fatal(err)
				}
			}
			if !bytes.Equal(out, object) {
				b.Fatal("not healed")
			}
		})
	}
}
