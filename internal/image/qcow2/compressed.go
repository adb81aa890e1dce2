package qcow2

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// decodedBytes bounds the decoded clusters that are kept for the next small
// read.
const decodedBytes = 4 << 20

// An inflater decodes one cluster: all of out from the beginning of in, behind
// which there may be anything.
type inflater interface {
	inflate(out, in []byte) error
}

var errTooLong = errors.New("it holds more than one cluster")

func newInflater(h *header) inflater {
	if h.compression == compressZstd {
		return zstdInflater{}
	}
	return zlibInflater{}
}

// packed gives the place of a compressed cluster: byte offset in the file and
// the most bytes that it can have.
func (h *header) packed(entry uint64) (off, n int64) {
	x := 62 - (h.clusterBits - 8)
	off = int64(entry & (1<<x - 1))
	sectors := int64(entry &^ (flagCopied | flagCompressed) >> x)
	return off, (sectors+1)*512 - off&511
}

// readCompressed fills p, which lies in one compressed cluster.
func (img *Image) readCompressed(p []byte, r run) error {
	cluster := img.header.clusterBytes()
	if inner := r.Off % cluster; int64(len(p)) < cluster {
		whole, err := img.decoded.get(r.entry, func() ([]byte, error) {
			whole := make([]byte, cluster)
			return whole, img.decode(whole, r.entry)
		})
		if err != nil {
			return err
		}
		copy(p, whole[inner:])
		return nil
	}
	// Who reads whole clusters does not come back for the rest.
	return img.decode(p, r.entry)
}

var packedPool sync.Pool // of *[]byte

// decode fills out, a whole cluster.
func (img *Image) decode(out []byte, entry uint64) error {
	off, n := img.header.packed(entry)
	// The last sector may be cut by the file's end.
	n = min(n, img.file.Bytes()-off)
	if n <= 0 {
		return img.corrupt(off, "a compressed cluster lies behind the end of a file of %d bytes", img.file.Bytes())
	}
	buf, _ := packedPool.Get().(*[]byte)
	if buf == nil || int64(cap(*buf)) < n {
		b := make([]byte, max(n, img.header.clusterBytes()+512))
		buf = &b
	}
	defer packedPool.Put(buf)
	in := (*buf)[:n]
	if err := readZeroEnd(img.file, in, off); err != nil {
		return err
	}
	if err := img.inflate.inflate(out, in); err != nil {
		return img.corrupt(off, "compressed cluster: %w", err)
	}
	return nil
}

type zlibInflater struct{}

type flateReader struct {
	in bytes.Reader
	r  io.ReadCloser
}

var flatePool sync.Pool // of *flateReader

func (zlibInflater) inflate(out, in []byte) error {
	fr, _ := flatePool.Get().(*flateReader)
	if fr == nil {
		fr = &flateReader{}
		fr.r = flate.NewReader(&fr.in)
	}
	defer flatePool.Put(fr)
	fr.in.Reset(in)
	if err := fr.r.(flate.Resetter).Reset(&fr.in, nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(fr.r, out); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	var more [1]byte
	if n, _ := fr.r.Read(more[:]); n > 0 {
		return errTooLong
	}
	return nil
}

type zstdInflater struct{}

// zstdDecoder decodes many clusters at once. Its output never grows beyond
// the buffer that it is given.
var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(1<<maxClusterBits))
})

func (zstdInflater) inflate(out, in []byte) error {
	d, err := zstdDecoder()
	if err != nil {
		return err
	}
	for done := 0; done < len(out); {
		// What follows a frame is the next cluster's frame, so the frame's
		// end must be found before it is decoded.
		n, err := frameBytes(in)
		if err != nil {
			return err
		}
		got, err := d.DecodeAll(in[:n], out[done:done:len(out)])
		if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
			return errTooLong
		} else if err != nil {
			return err
		}
		if len(got) == 0 {
			return errors.New("an empty frame")
		}
		done += len(got)
		in = in[n:]
	}
	return nil
}

// frameBytes is the length of the zstd frame that p begins with.
func frameBytes(p []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(p); err != nil {
		return 0, err
	}
	if h.Skippable {
		return 0, errors.New("a skippable frame")
	}
	n := h.HeaderSize
	for last := false; !last; {
		if len(p)-n < 3 {
			return 0, io.ErrUnexpectedEOF
		}
		word := uint32(p[n]) | uint32(p[n+1])<<8 | uint32(p[n+2])<<16
		last = word&1 != 0
		size := int(word >> 3)
		switch word >> 1 & 3 {
		case 1: // one byte, repeated
			size = 1
		case 3:
			return 0, errors.New("a reserved block type")
		}
		n += 3 + size
		if n > len(p) {
			return 0, io.ErrUnexpectedEOF
		}
	}
	if h.HasCheckSum {
		n += 4
	}
	if n > len(p) {
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}
