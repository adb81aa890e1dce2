package repo

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// referenceBytes is one reference: a chunk's key and a class.
const referenceBytes = 16 + 4

// referencesLimit is what references take in memory before they go to a
// temporary file, in bytes; less in tests.
var referencesLimit = 64 << 20

// references gathers who needs which chunk and gives it back chunk by chunk.
// Keys are uniformly random, so they are parted by their first byte, and only
// one of 256 parts is ever sorted: a million references take 80 KB there.
type references struct {
	part  [256][]byte
	bytes int
	limit int
	spool *manifest.Spool
	away  [256][]segment // of spool
}

type segment struct{ off, len int64 }

func newReferences() *references {
	return &references{limit: referencesLimit, spool: manifest.NewSpool()}
}

func (r *references) close() { r.spool.Close() }

func (r *references) add(id chunk.ID, class uint32) error {
	p := &r.part[id[0]]
	*p = append(*p, id[:16]...)
	*p = binary.LittleEndian.AppendUint32(*p, class)
	if r.bytes += referenceBytes; r.bytes < r.limit {
		return nil
	}
	r.bytes = 0
	for i := range r.part {
		b := r.part[i]
		if len(b) == 0 {
			continue
		}
		r.away[i] = append(r.away[i], segment{r.spool.Size(), int64(len(b))})
		if _, err := r.spool.Write(b); err != nil {
			return err
		}
		r.part[i] = b[:0]
	}
	return nil
}

// A reference is a chunk and the class of those who need it.
type reference struct {
	key   index.Key
	class uint32
}

// each calls fn for every part with its chunks, ascending by key and each once.
func (r *references) each(c *classes, fn func([]reference) error) error {
	var refs []reference
	for i := range r.part {
		refs = refs[:0]
		for _, s := range r.away[i] {
			b := make([]byte, s.len)
			if _, err := r.spool.ReadAt(b, s.off); err != nil {
				return fmt.Errorf("temporary file: %w", err)
			}
			refs = appendReferences(refs, b)
		}
		refs = appendReferences(refs, r.part[i])
		slices.SortFunc(refs, func(a, b reference) int { return a.key.Compare(&b.key) })
		n := 0
		for _, ref := range refs {
			if n > 0 && refs[n-1].key == ref.key {
				refs[n-1].class = c.join(refs[n-1].class, ref.class)
				continue
			}
			refs[n] = ref
			n++
		}
		if err := fn(refs[:n]); err != nil {
			return err
		}
	}
	return nil
}

func appendReferences(refs []reference, b []byte) []reference {
	for ; len(b) >= referenceBytes; b = b[referenceBytes:] {
		refs = append(refs, reference{index.Key(b[:16]), binary.LittleEndian.Uint32(b[16:])})
	}
	return refs
}
