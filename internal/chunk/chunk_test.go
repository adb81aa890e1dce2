package chunk

import (
	"math"
	"testing"
)

func TestCutting(t *testing.T) {
	const size = DefaultBytes
	for _, c := range []struct {
		name  string
		disk  int64
		count int64
		last  int64
	}{
		{"empty disk", 0, 0, 0},
		{"one byte", 1, 1, 1},
		{"one byte short of a chunk", size - 1, 1, size - 1},
		{"exactly one chunk", size, 1, size},
		{"one byte into the second", size + 1, 2, 1},
		{"62 TiB", 62 << 40, 62 << 21, size},
		{"the largest number", math.MaxInt64, math.MaxInt64/size + 1, size - 1},
	} {
		n := Count(c.disk, size)
		if n != c.count {
			t.Errorf("%s: %d chunks, want %d", c.name, n, c.count)
		}
		if n > 0 && Len(n-1, c.disk, size) != c.last {
			t.Errorf("%s: last is %d bytes, want %d", c.name, Len(n-1, c.disk, size), c.last)
		}
	}
}

func TestIsZeroSeesTheLastByte(t *testing.T) {
	p := make([]byte, DefaultBytes)
	if !IsZero(p) || !IsZero(nil) {
		t.Error("zeros are not zero")
	}
	p[len(p)-1] = 1
	if IsZero(p) {
		t.Error("a one at the end is missed")
	}
}

func TestCheckBytes(t *testing.T) {
	for n, ok := range map[int64]bool{0: false, 4096: false, MinBytes: true, DefaultBytes: true, DefaultBytes + 1: false, MaxBytes: true, MaxBytes * 2: false, -MinBytes: false} {
		if (CheckBytes(n) == nil) != ok {
			t.Errorf("CheckBytes(%d) = %v", n, CheckBytes(n))
		}
	}
}
