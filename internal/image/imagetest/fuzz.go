package imagetest

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// Agree walks an image that a fuzzer made, of which reads and extents must
// agree as far as it can be walked.
func Agree(t testing.TB, img image.Image) {
	t.Helper()
	n := 0
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil || n == 100 {
			break
		}
		n++
		p := bytes.Repeat([]byte{0xa5}, int(min(e.Len, 4096)))
		if got, err := img.ReadAt(p, e.Off); err != nil && err != io.EOF || got != len(p) {
			t.Fatalf("%+v cannot be read: %d, %v", e, got, err)
		}
		if e.Kind != image.Data && !isZero(p) {
			t.Fatalf("%+v is not zero", e)
		}
	}
}

// Play writes what a fuzzer's records say to a disk of size bytes, which reads
// as disk so far, and reads it back by open. A record is four bytes: the place
// in 32 KiB, halved so many times, and in 128 bytes, the length in 4 KiB and in
// bytes.
func Play(t testing.TB, w image.Writer, size int64, disk []byte, records []byte, halved int, open func() (image.Image, error)) {
	t.Helper()
	for ; len(records) >= 4; records = records[4:] {
		off := int64(records[0])<<(15-halved) | int64(records[1])<<7
		n := int64(records[2])<<12 | int64(records[3])
		if u := w.Unit(); u > 1 {
			off, n = off/u*u, n/u*u
		}
		off = min(off, size)
		n = min(n, size-off)
		p := bytes.Repeat([]byte{records[3] & 3}, int(n))
		copy(disk[off:], p)
		if m, err := w.WriteAt(p, off); m != len(p) || err != nil {
			t.Fatalf("WriteAt(%d, %d) = %d, %v", n, off, m, err)
		}
		if len(p) > 0 && p[0] == 0 { // zeros over data are not promised
			return
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	img, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, len(disk))
	if _, err := img.ReadAt(got, 0); err != nil && len(got) > 0 {
		t.Fatal(err)
	}
	if !bytes.Equal(got, disk) {
		t.Fatal("another content")
	}
}
