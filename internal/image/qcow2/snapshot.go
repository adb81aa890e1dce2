package qcow2

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

// A Snapshot is an internal snapshot of the disk.
type Snapshot struct {
	ID, Name string
	// VirtualBytes is the size of the disk then.
	VirtualBytes int64
	// Made is when, by the clock of the host.
	Made time.Time
	// StateBytes is the length of the VM's saved memory, 0 for none.
	StateBytes int64

	l1        int64
	l1Entries int64
}

const (
	maxSnapshots          = 65536
	maxSnapshotTableBytes = 16 << 20
	snapshotHeaderBytes   = 40
)

// Snapshots lists the internal snapshots.
func (img *Image) Snapshots() []Snapshot { return img.snapshots }

// readSnapshots reads the snapshot table, and nothing that its entries name.
func (img *Image) readSnapshots() error {
	h := &img.header
	if h.snapshotCount == 0 {
		return nil
	}
	if h.snapshotCount > maxSnapshots {
		return img.corrupt(60, "%d snapshots", h.snapshotCount)
	}
	start := h.snapshotOffset
	if start <= 0 || start%h.clusterBytes() != 0 {
		return img.corrupt(64, "snapshot table at %d", uint64(start))
	}
	// The file's own length is the limit here: the table's last bytes are
	// not zeros.
	end := min(img.file.Bytes(), start+maxSnapshotTableBytes)
	r := &tableReader{img: img, off: start, end: end, view: img.ownView()}
	be := binary.BigEndian
	for range h.snapshotCount {
		r.align(start)
		at := r.off
		p, err := r.read(snapshotHeaderBytes)
		if err != nil {
			return fmt.Errorf("snapshot %d of %d: %w", len(img.snapshots)+1, h.snapshotCount, err)
		}
		s := Snapshot{
			l1:           int64(be.Uint64(p)),
			l1Entries:    int64(be.Uint32(p[8:])),
			Made:         time.Unix(int64(be.Uint32(p[16:])), int64(be.Uint32(p[20:]))).UTC(),
			StateBytes:   int64(be.Uint32(p[32:])),
			VirtualBytes: h.size,
		}
		idBytes, nameBytes, extraBytes := int(be.Uint16(p[12:])), int(be.Uint16(p[14:])), int64(be.Uint32(p[36:]))
		if extraBytes > 1024 {
			return img.corrupt(at+36, "snapshot with %d bytes of extra data", extraBytes)
		}
		if p, err = r.read(int(extraBytes)); err != nil {
			return err
		}
		if len(p) >= 8 {
			s.StateBytes = int64(be.Uint64(p))
		}
		if len(p) >= 16 {
			s.VirtualBytes = int64(be.Uint64(p[8:]))
		} else {
			// Old snapshots do not say. The disk may have grown since.
			s.VirtualBytes = min(s.VirtualBytes, s.l1Entries*h.clustersPerL2()<<h.clusterBits)
		}
		if p, err = r.read(idBytes + nameBytes); err != nil {
			return err
		}
		s.ID, s.Name = string(p[:idBytes]), string(p[idBytes:])
		img.snapshots = append(img.snapshots, s)
	}
	return nil
}

// findSnapshot prefers a name over an ID, as QEMU does.
func (img *Image) findSnapshot(want string) (state, error) {
	for _, of := range []func(*Snapshot) string{
		func(s *Snapshot) string { return s.Name },
		func(s *Snapshot) string { return s.ID },
	} {
		for i := range img.snapshots {
			if s := &img.snapshots[i]; of(s) == want {
				return img.checkState(state{s.VirtualBytes, s.l1, s.l1Entries}, fmt.Sprintf("L1 table of snapshot %q", want))
			}
		}
	}
	return state{}, fmt.Errorf("%s: snapshot %q: %w", img.file.Name(), want, fault.ErrNotFound)
}

// A tableReader reads a table of entries of different lengths, front to back.
type tableReader struct {
	img      *Image
	off, end int64
	view     view
	buf      []byte
}

// read gives the next n bytes, until the next call.
func (r *tableReader) read(n int) ([]byte, error) {
	if int64(n) > r.end-r.off {
		return nil, r.img.corrupt(r.off, "a table ends inside an entry")
	}
	r.buf = r.buf[:0]
	for len(r.buf) < n {
		p, err := r.view(r.off, int64(n-len(r.buf)))
		if err != nil {
			return nil, err
		}
		r.buf = append(r.buf, p...)
		r.off += int64(len(p))
	}
	return r.buf, nil
}

// align skips to a multiple of 8 bytes from start on.
func (r *tableReader) align(start int64) {
	r.off = start + (r.off-start+7)&^7
}
