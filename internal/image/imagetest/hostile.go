package imagetest

import (
	"bytes"
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// What a hostile file may cost before its first byte is served. The time is
// far above what is promised, because tests share their machine; where it is
// known it is of a processor, of which a busy machine has little for each test.
// Nothing that only waits takes hangTime.
const (
	HostileBytes = 64 << 20
	HostileTime  = 5 * time.Second

	hangTime = 5 * time.Minute
)

// Hostile opens what may be a hostile file, reads a few bytes of it and walks
// the first of its extents, and fails t if that cost too much memory or time.
// It returns the first error, nil for a file that is fine after all. Tests
// that call it must not run in parallel with others, since memory is counted
// for the whole process.
func Hostile(t testing.TB, open func() (image.Image, error)) error {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start, worked := time.Now(), processorTime()
	done := make(chan error, 1)
	go func() { done <- touch(open) }()
	var err error
	for limit := HostileTime; ; limit = time.Second {
		select {
		case err = <-done:
		case <-time.After(limit):
			if took := time.Since(start); processorTime()-worked > HostileTime || took > hangTime {
				t.Fatalf("not served after %v", took)
			}
			continue
		}
		break
	}
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > HostileBytes {
		t.Errorf("allocated %d MiB before the first byte, at most %d are allowed (error: %v)", n>>20, HostileBytes>>20, err)
	}
	if took > time.Second {
		t.Logf("slow: %v until the first byte", took)
	}
	return err
}

// Bytes makes a File of p, which must not change.
func Bytes(name string, p []byte) image.File {
	return bytesFile{bytes.NewReader(p), name}
}

type bytesFile struct {
	*bytes.Reader
	name string
}

func (f bytesFile) Bytes() int64 { return f.Size() }
func (f bytesFile) Name() string { return f.name }
func (f bytesFile) Close() error { return nil }

// touch is what people do first with an image.
func touch(open func() (image.Image, error)) error {
	img, err := open()
	if err != nil {
		return err
	}
	defer img.Close()
	img.Info()
	size := img.Size()
	for _, off := range []int64{0, size / 2, size - 1} {
		if off < 0 || off >= size {
			continue
		}
		if _, err := img.ReadAt(make([]byte, 1), off); err != nil {
			return err
		}
	}
	n := 0
	for _, err := range img.Extents(context.Background(), extent.Extent{Len: size}) {
		if err != nil {
			return err
		}
		if n++; n == 1000 {
			break
		}
	}
	return nil
}
