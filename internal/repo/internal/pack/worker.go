package pack

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/zstd"
)

// A Worker names, seals and opens chunks with memory of its own. It is not
// safe for concurrent use: every goroutine has one.
type Worker struct {
	repo     [16]byte
	idHash   *blake3.Hasher
	keyHash  *blake3.Hasher
	codec    *zstd.Codec
	overlays *seal.Overlays
	frame    []byte // a chunk compressed
	blocks   []byte // those of an overlay
	body     []byte // of an overlay
	record   []byte
	aad      []byte
}

// NewWorker makes a worker for the repository with this id. Level is zstd's.
func NewWorker(repo [16]byte, k *seal.Keys, level int) *Worker {
	return &Worker{repo: repo, idHash: k.ID.Hasher(), keyHash: k.Data.Hasher(), overlays: k.Meta.Overlays(), codec: zstd.New(level)}
}

// ID names the chunk that holds plain.
func (w *Worker) ID(plain []byte) (id chunk.ID) {
	w.idHash.Reset()
	w.idHash.Write(plain)
	w.idHash.Sum(id[:0])
	return id
}

func (w *Worker) key(id *chunk.ID) (k seal.Key) {
	w.keyHash.Reset()
	w.keyHash.Write(id[:])
	w.keyHash.Sum(k[:0])
	return k
}

func (w *Worker) bind(e *Entry) []byte {
	w.aad = append(w.aad[:0], w.repo[:]...)
	w.aad = append(w.aad, e.ID[:]...)
	w.aad = append(w.aad, e.Encoding)
	w.aad = le.AppendUint32(w.aad, e.PLen)
	return w.aad
}

// Seal makes the record of a chunk, which is valid until the worker's next
// call. Without compress, and where it would gain less than a twentieth, the
// chunk is stored as it is.
func (w *Worker) Seal(id chunk.ID, plain []byte, compress bool) (Entry, []byte, error) {
	e, body := Entry{ID: id, PLen: uint32(len(plain)), Encoding: Raw}, plain
	if compress {
		if n := zstd.Bound(len(plain)); cap(w.frame) < n {
			w.frame = make([]byte, n)
		}
		frame, err := w.codec.Compress(w.frame, plain)
		if err != nil {
			return e, nil, fmt.Errorf("compress: %w", err)
		}
		if len(frame) <= len(plain)-len(plain)/20 && len(frame) < len(plain) {
			body, e.Encoding = frame, Zstd
		}
	}
	var nonce [seal.NonceBytes]byte
	rand.Read(nonce[:])
	rec := w.seal(&e, body, nonce)
	return e, rec, nil
}

// seal makes the record of e, whose encoding gave body.
func (w *Worker) seal(e *Entry, body []byte, nonce [seal.NonceBytes]byte) []byte {
	e.CLen = uint32(len(body))
	if n := int(e.Bytes()); cap(w.record) < n {
		w.record = make([]byte, 0, n+n/4)
	}
	k := w.key(&e.ID)
	rec := k.SealWith(w.record[:RecordHeader], nonce, body, w.bind(e))
	putRecordHeader(rec, *e, crc32.Checksum(rec[RecordHeader:], castagnoli))
	return rec
}

// Open gives the chunk id out of its record, in dst's memory if that suffices.
// It overwrites the record. It gives ErrOverlay where the record is one. Other
// errors are evidence without a place.
func (w *Worker) Open(dst, record []byte, id chunk.ID) ([]byte, error) {
	dst, err := w.Expand(dst, record, id)
	if err == nil {
		err = w.Prove(dst, id)
	}
	if err != nil {
		return nil, err
	}
	return dst, nil
}

// Prove says whether plain is the chunk id.
func (w *Worker) Prove(plain []byte, id chunk.ID) error {
	if got := w.ID(plain); !bytes.Equal(got[:], id[:]) {
		return errors.New("chunk does not match its id")
	}
	return nil
}

// unseal gives what the record id seals, in the record's memory.
func (w *Worker) unseal(record []byte, id chunk.ID) (e Entry, body []byte, err error) {
	e, _, err = ParseRecordHeader(record)
	if err != nil {
		return e, nil, err
	}
	if e.ID != id {
		return e, nil, fmt.Errorf("record of chunk %s where %s should be", e.ID.Short(), id.Short())
	}
	if int64(len(record)) < e.Bytes() {
		return e, nil, errors.New("record is cut short")
	}
	sealed := record[RecordHeader:e.Bytes()]
	k := w.key(&id)
	body, err = k.Open(sealed[seal.NonceBytes:seal.NonceBytes], sealed, w.bind(&e))
	return e, body, err
}

// Expand is Open without the proof that what was sealed has that id: for the
// bases of overlays, which are proven by what becomes of them.
func (w *Worker) Expand(dst, record []byte, id chunk.ID) ([]byte, error) {
	e, body, err := w.unseal(record, id)
	if err != nil {
		return nil, err
	}
	if e.Encoding == Overlay {
		return nil, ErrOverlay
	}
	if cap(dst) < int(e.PLen) {
		dst = make([]byte, e.PLen)
	}
	dst = dst[:e.PLen]
	switch e.Encoding {
	case Raw:
		if copy(dst, body) != len(body) || len(body) != len(dst) {
			return nil, errors.New("raw record has another length than its chunk")
		}
	case Zstd:
		if err := w.codec.Expand(dst, body); err != nil {
			return nil, fmt.Errorf("expand: %w", err)
		}
	default:
		return nil, fmt.Errorf("record encoding %d: %w", e.Encoding, fault.ErrUnsupported)
	}
	return dst, nil
}
