package qcow2

import (
	"bytes"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	stdflate "compress/flate"
)

// roundTripDeflate compresses p and lets another decoder judge.
func roundTripDeflate(t testing.TB, e *deflateEncoder, p []byte) int {
	t.Helper()
	packed := e.encode([]byte("before"), p)
	if string(packed[:6]) != "before" {
		t.Fatal("what was before is gone")
	}
	got, err := io.ReadAll(stdflate.NewReader(bytes.NewReader(packed[6:])))
	if err != nil {
		t.Fatalf("%d bytes: %v", len(p), err)
	}
	if !bytes.Equal(got, p) {
		t.Fatalf("%d bytes come back different", len(p))
	}
	if len(p) <= 64<<10 { // the other one is slow
		got, far, err := farthest(packed[6:])
		if err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%d bytes by the letter: %v", len(p), err)
		}
		if far > deflateWindow {
			t.Fatalf("a match %d bytes back", far)
		}
	}
	return len(packed) - 6
}

func TestDeflateRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	// Fibonacci frequencies make the longest codes there can be.
	var skewed []byte
	for a, b, c := 1, 1, 0; len(skewed) < 200<<10; a, b, c = b, a+b, c+1 {
		skewed = append(skewed, bytes.Repeat([]byte{byte(c)}, a)...)
	}
	r.Shuffle(len(skewed), func(i, j int) { skewed[i], skewed[j] = skewed[j], skewed[i] })
	few := make([]byte, 200<<10)
	for i := range few {
		few[i] = "ab"[r.IntN(2)]
	}
	for level := 1; level <= 9; level++ {
		e := newDeflateEncoder(level)
		for name, p := range map[string][]byte{
			"nothing":            nil,
			"one byte":           {7},
			"three bytes":        []byte("aaa"),
			"zeros":              make([]byte, 64<<10),
			"noise":              noise,
			"noise twice, near":  append(noise[:4095:4095], noise[:4095]...),
			"noise twice, far":   append(noise[:4097:4097], noise[:4097]...),
			"text":               []byte(strings.Repeat("the quick brown fox jumps over the lazy dog. ", 1500)),
			"skewed frequencies": skewed,
			"two letters":        few,
		} {
			t.Run(name, func(t *testing.T) {
				n := roundTripDeflate(t, e, p)
				if len(p) > 5<<10 && n > len(p)+len(p)/64 {
					t.Errorf("%d bytes became %d", len(p), n)
				}
			})
		}
	}
}

// Readers may keep no more than 4 KiB of what they have decoded.
func TestDeflateKeepsItsWindow(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	p := make([]byte, 5000)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	e := newDeflateEncoder(9)
	for gap := 4080; gap < 4120; gap++ {
		q := append(append([]byte(nil), p[:gap]...), p[:100]...)
		e.src, e.next = q, 0
		if _, dist := e.find(gap, minMatch-1, 100); dist >= deflateWindow {
			t.Errorf("a match %d bytes back", dist)
		}
		e.base += 2 * deflateWindow
	}
}

func FuzzDeflate(f *testing.F) {
	f.Add([]byte("hello hello hello"), uint8(6))
	f.Add(bytes.Repeat([]byte{0, 1, 2, 3}, 3000), uint8(1))
	f.Fuzz(func(t *testing.T, p []byte, level uint8) {
		e := newDeflateEncoder(int(level%9) + 1)
		roundTripDeflate(t, e, p)
		roundTripDeflate(t, e, p) // an encoder forgets the cluster before
	})
}
