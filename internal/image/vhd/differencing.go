package vhd

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// child makes w's header that of a layer over o.Parent, whose name goes behind
// the table.
func (w *Writer) child(o image.CreateOptions) error {
	if o.ParentInfo == nil || o.ParentInfo.Format != image.VHD {
		return fmt.Errorf("a VHD over %q, which is no VHD", o.Parent)
	}
	id, err := hex.DecodeString(strings.ReplaceAll(o.ParentInfo.Identity, "-", ""))
	if err != nil || len(id) != len(w.header.parent) {
		return fmt.Errorf("a VHD over %q, whose UUID is %q", o.Parent, o.ParentInfo.Identity)
	}
	if o.ParentInfo.VirtualBytes != w.footer.currentBytes {
		return fmt.Errorf("a VHD of %d bytes over a parent of %d", w.footer.currentBytes, o.ParentInfo.VirtualBytes)
	}
	w.footer.kind = typeDifferencing
	w.header.parent = uuid(id)
	w.sparse = map[int64]*layer.Sectors{}
	name, code := strings.ReplaceAll(o.Parent, "/", `\`), "W2ru"
	w.header.parentName = name[strings.LastIndexByte(name, '\\')+1:]
	switch {
	case strings.HasPrefix(name, `\\`) || len(name) > 1 && name[1] == ':':
		code = "W2ku"
	case strings.HasPrefix(name, `\`):
		// Windows knows no such path, and would look for it on its present drive.
		name = `.\` + w.header.parentName
		w.warnings = append(w.warnings, fmt.Sprintf("a VHD has names of Windows alone, so the parent %q is named as if it lay beside the image", o.Parent))
	case !strings.HasPrefix(name, `.\`) && !strings.HasPrefix(name, `..\`):
		name = `.\` + name
	}
	for _, u := range utf16.Encode([]rune(name)) {
		w.locator = binary.LittleEndian.AppendUint16(w.locator, u)
	}
	if len(w.locator) > maxLocator {
		return errors.New("the parent's name is too long")
	}
	// Windows counts the locator's room in bytes, whatever the specification
	// says of sectors.
	room := (int64(len(w.locator)) + sectorBytes - 1) / sectorBytes * sectorBytes
	w.header.locators[0] = locator{code: code, space: uint32(room), bytes: uint32(len(w.locator)), off: w.end}
	w.end += room
	return nil
}

// mark records that a range within one block is not the parent's any more.
func (w *Writer) mark(off, n int64) {
	block, first := off/w.header.blockBytes, off%w.header.blockBytes/sectorBytes
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sparse[block]
	if s == nil {
		length := min(w.header.blockBytes, w.footer.currentBytes-block*w.header.blockBytes)
		s = layer.NewSectors(length/sectorBytes, int64(len(w.bitmap)), layer.HighFirst)
		w.sparse[block] = s
	}
	s.Mark(first, (n+sectorBytes-1)/sectorBytes)
}

// writeSparse gives a place to blocks of which only zeros were written, holes
// of the file, and writes what locate could not know: the bitmaps and the
// parent's name.
func (w *Writer) writeSparse() error {
	if w.footer.kind != typeDifferencing {
		return nil
	}
	for block := range w.header.entries {
		s := w.sparse[block]
		if s == nil {
			continue
		}
		at, err := w.locate(block * w.header.blockBytes)
		if err != nil {
			return err
		}
		if s.Bits != nil { // else the bitmap that locate wrote is right
			if _, err := w.file.WriteAt(s.Bits, at-int64(len(w.bitmap))); err != nil {
				return err
			}
		}
	}
	_, err := w.file.WriteAt(w.locator, w.header.locators[0].off)
	return err
}
