package vmdk_test

import (
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// Random reads of 64 KiB of a disk of 256 MiB whose grains lie in the order in
// which they were written, by one reader and by as many as there are
// processors.
func BenchmarkReadAt(b *testing.B) {
	for _, variant := range []string{vmdk.MonolithicSparse, vmdk.MonolithicFlat, vmdk.StreamOptimized} {
		path := filepath.Join(b.TempDir(), "disk.vmdk")
		const size, grain = 256 << 20, 64 << 10
		w, err := vmdk.Create(path, image.CreateOptions{VirtualBytes: size, Variant: variant})
		if err != nil {
			b.Fatal(err)
		}
		order := rand.New(rand.NewPCG(1, 2)).Perm(size / grain)
		p := make([]byte, grain)
		for i, n := range order {
			if w.Ordered() {
				n = i
			}
			for j := range p {
				p[j] = byte(n*j>>8) | 1
			}
			if _, err := w.WriteAt(p, int64(n)*grain); err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Finish(); err != nil {
			b.Fatal(err)
		}
		img, err := openPath(path)
		if err != nil {
			b.Fatal(err)
		}
		defer img.Close()
		read := func(r *rand.Rand, p []byte) {
			if _, err := img.ReadAt(p, r.Int64N(size/4096-16)*4096); err != nil {
				b.Error(err)
			}
		}
		b.Run(variant, func(b *testing.B) {
			b.SetBytes(grain)
			r, p := rand.New(rand.NewPCG(3, 4)), make([]byte, grain)
			for b.Loop() {
				read(r, p)
			}
		})
		b.Run(variant+" in parallel", func(b *testing.B) {
			b.SetBytes(grain)
			b.RunParallel(func(pb *testing.PB) {
				r, p := rand.New(rand.NewPCG(rand.Uint64(), 4)), make([]byte, grain)
				for pb.Next() {
					read(r, p)
				}
			})
		})
	}
}
