package zstd

import (
	"bytes"
	"testing"
)

func TestChunksComeBack(t *testing.T) {
	for _, level := range []int{0, 1, 3, 9} {
		c := New(level)
		for _, plain := range [][]byte{{1}, bytes.Repeat([]byte("abc"), 100_000), make([]byte, 4<<20)} {
			frame, err := c.Compress(make([]byte, Bound(len(plain))), plain)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(plain))
			if err := c.Expand(got, frame); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("level %d, %d bytes: %v", level, len(plain), err)
			}
			for name, dst := range map[string][]byte{"too short": make([]byte, len(plain)-1), "too long": make([]byte, len(plain)+1)} {
				if c.Expand(dst, frame) == nil {
					t.Errorf("level %d, %d bytes: no error where the chunk is %s", level, len(plain), name)
				}
			}
		}
		if c.Expand(make([]byte, 1), nil) == nil {
			t.Error("an empty frame expands")
		}
	}
}

// Frames are only opened after their seal, but not everyone with a key means
// well.
func FuzzExpand(f *testing.F) {
	c := New(1)
	frame, _ := c.Compress(nil, bytes.Repeat([]byte("abc"), 1000))
	f.Add(bytes.Clone(frame), uint16(3000))
	f.Add([]byte("\x28\xb5\x2f\xfd"), uint16(9))
	f.Fuzz(func(t *testing.T, frame []byte, n uint16) {
		c.Expand(make([]byte, n), frame)
	})
}
