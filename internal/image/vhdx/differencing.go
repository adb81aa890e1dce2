package vhdx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// child makes m the metadata of a layer over o.Parent.
func (m *metadata) child(o image.CreateOptions) error {
	if o.ParentInfo == nil || o.ParentInfo.Format != image.VHDX {
		return fmt.Errorf("a VHDX over %q, which is no VHDX", o.Parent)
	}
	link, ok := parseGUID(o.ParentInfo.Identity)
	if !ok {
		return fmt.Errorf("a VHDX over %q, whose DataWriteGuid is %q", o.Parent, o.ParentInfo.Identity)
	}
	if m.logicalSector == 0 {
		m.logicalSector = int64(o.ParentInfo.SectorBytes)
	}
	if m.logicalSector != int64(o.ParentInfo.SectorBytes) {
		return fmt.Errorf("a VHDX with sectors of %d bytes over a parent with %d", m.logicalSector, o.ParentInfo.SectorBytes)
	}
	if id, ok := parseGUID(o.ParentInfo.FormatDetails["disk identity"]); ok {
		m.diskID = id // the disk is the same, whichever layer shows it
	}
	if len(o.Parent) > 1<<14 {
		return errors.New("the parent's name is too long")
	}
	m.differencing = true
	m.locator = locate(o.Parent)
	m.locator["parent_linkage"] = "{" + link.String() + "}"
	return nil
}

// locate is how a locator names a parent. Absolute names are of the kind that
// Windows does not shorten.
func locate(parent string) map[string]string {
	name := strings.ReplaceAll(parent, "/", `\`)
	switch {
	case strings.HasPrefix(name, `\\?\`):
		return map[string]string{"absolute_win32_path": name}
	case strings.HasPrefix(name, `\\`):
		return map[string]string{"absolute_win32_path": `\\?\UNC` + name[1:]}
	case len(name) > 1 && name[1] == ':':
		return map[string]string{"absolute_win32_path": `\\?\` + name}
	case strings.HasPrefix(name, `\`):
		// Windows knows no such path, and would look for it on its present drive.
		name = `.\` + name[strings.LastIndexByte(name, '\\')+1:]
	case !strings.HasPrefix(name, `.\`) && !strings.HasPrefix(name, `..\`):
		name = `.\` + name
	}
	// Every layer that Windows makes has both kinds of name, and libvhdi takes
	// the file's name from the absolute one alone. Windows goes by the relative
	// one first, and by the linkage whatever a name leads to.
	rest := name
	for strings.HasPrefix(rest, `.\`) || strings.HasPrefix(rest, `..\`) {
		_, rest, _ = strings.Cut(rest, `\`)
	}
	return map[string]string{"relative_path": name, "absolute_win32_path": `\\?\C:\` + rest}
}

// mark records that a range within one block is not the parent's any more.
func (w *Writer) mark(off, n int64) {
	sector := w.meta.logicalSector
	block, first := off/w.meta.blockBytes, off%w.meta.blockBytes/sector
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sparse[block]
	if s == nil {
		length := min(w.meta.blockBytes, w.meta.diskBytes-block*w.meta.blockBytes)
		s = layer.NewSectors(length/sector, w.meta.blockBytes/sector/8, layer.LowFirst)
		w.sparse[block] = s
	}
	s.Mark(first, (n+sector-1)/sector)
}

// placeSparse gives a place to blocks of which only some sectors were written
// and those with zeros: holes of the file.
func (w *Writer) placeSparse() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.meta.differencing {
		return nil
	}
	for n := range w.blocks() {
		if s := w.sparse[n]; s != nil && s.Bits != nil {
			w.place(n)
		}
	}
	return nil
}

// writeBitmaps appends the bitmap of every chunk that has a partial block, and
// makes its entry in the table.
func (w *Writer) writeBitmaps() error {
	if !w.meta.differencing {
		return nil
	}
	blocks := w.blocks()
	perBlock := w.meta.blockBytes / w.meta.logicalSector / 8
	for from := int64(0); from < blocks; from += w.ratio {
		var bitmap []byte
		for n := from; n < min(from+w.ratio, blocks); n++ {
			s := w.sparse[n]
			if s == nil || s.Bits == nil {
				continue
			}
			if bitmap == nil {
				bitmap = make([]byte, bitmapBytes)
			}
			copy(bitmap[(n-from)*perBlock:], s.Bits)
		}
		if bitmap == nil {
			continue
		}
		if err := w.write(bitmap, w.end); err != nil {
			return err
		}
		index := from/w.ratio*(w.ratio+1) + w.ratio
		var e [8]byte
		binary.LittleEndian.PutUint64(e[:], uint64(w.end)|statePresent)
		if err := w.write(e[:], tableOffset+8*index); err != nil {
			return err
		}
		w.end += bitmapBytes
	}
	return nil
}

// encode lays the items out as Windows does.
func (m metadata) encode() []byte {
	p := make([]byte, mib)
	copy(p, "metadata")
	n := 0
	at := int64(metadataTableBytes)
	put := func(id guid, flags uint32, value []byte) {
		e := p[32+32*n:]
		copy(e, id[:])
		binary.LittleEndian.PutUint32(e[16:], uint32(at))
		binary.LittleEndian.PutUint32(e[20:], uint32(len(value)))
		binary.LittleEndian.PutUint32(e[24:], flags)
		at += int64(copy(p[at:], value))
		n++
	}
	var flags uint32
	if m.fixed {
		flags |= leaveAllocated
	}
	if m.differencing {
		flags |= hasParent
	}
	le := binary.LittleEndian
	put(itemFileParameters, itemRequired, le.AppendUint32(le.AppendUint32(nil, uint32(m.blockBytes)), flags))
	put(itemDiskBytes, itemDisk|itemRequired, le.AppendUint64(nil, uint64(m.diskBytes)))
	put(itemLogicalSector, itemDisk|itemRequired, le.AppendUint32(nil, uint32(m.logicalSector)))
	put(itemPhysicalSector, itemDisk|itemRequired, le.AppendUint32(nil, uint32(m.physicalSector)))
	put(itemDiskID, itemDisk|itemRequired, m.diskID[:])
	if m.differencing {
		put(itemParentLocator, itemRequired, encodeLocator(m.locator))
	}
	le.PutUint16(p[10:], uint16(n))
	return p
}

func encodeLocator(pairs map[string]string) []byte {
	le := binary.LittleEndian
	p := append([]byte(nil), locatorVHDX[:]...)
	p = le.AppendUint16(p, 0)
	p = le.AppendUint16(p, uint16(len(pairs)))
	at := len(p) + 12*len(pairs)
	var texts []byte
	for _, key := range []string{"parent_linkage", "relative_path", "absolute_win32_path"} {
		value, ok := pairs[key]
		if !ok {
			continue
		}
		k, v := utf16Bytes(key), utf16Bytes(value)
		p = le.AppendUint32(p, uint32(at+len(texts)))
		p = le.AppendUint32(p, uint32(at+len(texts)+len(k)))
		p = le.AppendUint16(p, uint16(len(k)))
		p = le.AppendUint16(p, uint16(len(v)))
		texts = append(append(texts, k...), v...)
	}
	return append(p, texts...)
}
