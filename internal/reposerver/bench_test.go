package reposerver

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/remote"
)

// Packs of 64 MiB, stored and read back in runs of 4 MiB, through a server and
// without one. BENCH=… TMPDIR=/dev/shm leaves the disk out.
func BenchmarkStore(b *testing.B) {
	pack := make([]byte, 64<<20)
	rand.Read(pack)
	for name, open := range map[string]func(b *testing.B) blob.Store{
		"directory": func(b *testing.B) blob.Store {
			st, err := file.Create(b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			return st
		},
		"server": func(b *testing.B) blob.Store {
			g := serve(b, Options{ImmutableFor: -1})
			st, err := remote.Create(b.Context(), g.at("r"), g.token("a", Admin, "r"))
			if err != nil {
				b.Fatal(err)
			}
			return st
		},
	} {
		b.Run(name+"/put", func(b *testing.B) {
			st := open(b)
			b.SetBytes(int64(len(pack)))
			for n := 0; b.Loop(); n++ {
				if err := st.Put(b.Context(), fmt.Sprintf("data/%d", n%4), bytes.NewReader(pack), int64(len(pack))); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/get", func(b *testing.B) {
			st := open(b)
			if err := st.Put(b.Context(), "data/0", bytes.NewReader(pack), int64(len(pack))); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(pack)))
			run := make([]byte, 4<<20)
			for b.Loop() {
				for off := 0; off < len(pack); off += len(run) {
					if _, err := st.ReadAt(b.Context(), "data/0", run, int64(off)); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
