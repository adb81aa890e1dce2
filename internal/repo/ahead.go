package repo

import (
	"io"
	"sync"

	"github.com/backstay/backstay/internal/blob"
)

// ahead reads an object of size bytes in the larger pieces that suit a store
// far away: the pages of a manifest are small, and they are read one after the
// other. A local disk is read as it comes.
func (r *Repository) ahead(src io.ReaderAt, size int64) io.ReaderAt {
	shape := blob.ShapeOf(r.st)
	if shape.InFlight == 0 {
		return src
	}
	return &aheadReader{src: src, size: size, piece: shape.Gap}
}

// An aheadReader keeps the last two pieces that it read: where a table says
// where a page is, both are needed again.
type aheadReader struct {
	src         io.ReaderAt
	size, piece int64

	mu   sync.Mutex
	have [2]aheadPiece // the later used first
}

type aheadPiece struct {
	off  int64
	data []byte
}

func (a *aheadReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= a.size || int64(len(p)) > a.piece {
		return a.src.ReadAt(p, off)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for n < len(p) && off+int64(n) < a.size {
		piece, err := a.at((off + int64(n)) / a.piece * a.piece)
		if err != nil {
			return n, err
		}
		k := copy(p[n:], piece.data[min(off+int64(n)-piece.off, int64(len(piece.data))):])
		if n += k; k == 0 {
			break // the object is shorter than it was
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// at gives the piece that begins at off.
func (a *aheadReader) at(off int64) (aheadPiece, error) {
	for i, have := range a.have {
		if have.data != nil && have.off == off {
			a.have[0], a.have[i] = have, a.have[0]
			return have, nil
		}
	}
	data := make([]byte, min(a.piece, a.size-off))
	n, err := a.src.ReadAt(data, off)
	if err != nil && err != io.EOF {
		return aheadPiece{}, err
	}
	a.have[1] = a.have[0]
	a.have[0] = aheadPiece{off, data[:n]}
	return a.have[0], nil
}
