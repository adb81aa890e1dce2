package manifest

import (
	"crypto/rand"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// Said is what a Draft knows about a position.
type Said uint8

// Nothing was said yet, it is a hole, it is a chunk.
const (
	Nothing Said = iota
	Hole
	Data
)

// A DraftPage is a page while its positions come in.
type DraftPage struct {
	IDs   [Positions]chunk.ID
	Said  [Positions]Said
	bases *[Positions]chunk.ID // of overlays; nil where there are none
}

// Base is on which chunk the record of position i is an overlay, or the zero
// ID.
func (p *DraftPage) Base(i int) (base chunk.ID) {
	if p.bases != nil {
		base = p.bases[i]
	}
	return base
}

// draftPages is how many pages of a Draft stay in memory: 8 MiB.
const draftPages = 128

// A Draft collects what is said about the positions of one disk, in any order
// and however large the disk. Pages that do not fit in memory wait sealed in a
// temporary file. It is safe for concurrent use.
type Draft struct {
	mu    sync.Mutex
	pages map[int64]*DraftPage // in memory
	used  map[int64]uint64     // when each of them was last touched
	slots map[int64]int64      // where each page waits in the file, or allHoles
	based map[int64]bool       // which of those that wait have bases
	next  int64                // the first slot never used
	clock uint64
	limit int
	file  *os.File
	key   seal.Key
	last  *DraftPage // the page that was touched last, and its number
	no    int64
}

// NewDraft makes an empty Draft.
func NewDraft() *Draft {
	d := &Draft{pages: map[int64]*DraftPage{}, used: map[int64]uint64{}, slots: map[int64]int64{}, based: map[int64]bool{}, limit: draftPages}
	rand.Read(d.key[:])
	return d
}

// Set says that position index is the chunk id, and on which base its record is
// an overlay; the zero ID if it is none.
func (d *Draft) Set(index int64, id, base chunk.ID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, err := d.page(index / Positions)
	if err != nil {
		return err
	}
	p.IDs[index%Positions], p.Said[index%Positions] = id, Data
	if p.bases == nil && base != (chunk.ID{}) {
		p.bases = new([Positions]chunk.ID)
	}
	if p.bases != nil {
		p.bases[index%Positions] = base
	}
	return nil
}

// SetHole says that position index is a hole.
func (d *Draft) SetHole(index int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, err := d.page(index / Positions)
	if err != nil {
		return err
	}
	p.Said[index%Positions] = Hole
	return nil
}

// Said is what was said about position index.
func (d *Draft) Said(index int64) (Said, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	no := index / Positions
	if d.pages[no] == nil {
		if _, waits := d.slots[no]; !waits {
			return Nothing, nil
		}
	}
	p, err := d.page(no)
	if err != nil {
		return Nothing, err
	}
	return p.Said[index%Positions], nil
}

// Pages are the numbers of all pages that something was said about,
// ascending.
func (d *Draft) Pages() []int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	nos := slices.AppendSeq(slices.Collect(maps.Keys(d.pages)), maps.Keys(d.slots))
	slices.Sort(nos)
	return slices.Compact(nos)
}

// Page gives what was said about page no. It is only valid until the next
// call.
func (d *Draft) Page(no int64) (*DraftPage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.page(no)
}

// Close removes the temporary file; it may be called twice.
func (d *Draft) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pages, d.last = nil, nil
	if d.file == nil {
		return nil
	}
	f := d.file
	d.file = nil
	return drop(f)
}

func (d *Draft) page(no int64) (*DraftPage, error) {
	if d.last != nil && d.no == no {
		return d.last, nil
	}
	d.clock++
	p := d.pages[no]
	if p == nil {
		if len(d.pages) >= d.limit {
			if err := d.evict(); err != nil {
				return nil, err
			}
		}
		p = new(DraftPage)
		if err := d.load(no, p); err != nil {
			return nil, err
		}
		d.pages[no] = p
	}
	d.used[no] = d.clock
	d.last, d.no = p, no
	return p, nil
}

// allHoles stands for a page that says hole everywhere and so needs no slot.
const allHoles = -1

// Room for a page in the file, and what one without bases takes of it.
const (
	slotBytes  = Positions*(33+32) + seal.Overhead
	plainBytes = Positions * 33
)

// evict writes the quarter of the pages that was not touched for longest.
func (d *Draft) evict() error {
	nos := slices.Collect(maps.Keys(d.pages))
	slices.SortFunc(nos, func(a, b int64) int { return int(d.used[a]) - int(d.used[b]) })
	plain := make([]byte, 0, slotBytes)
	for _, no := range nos[:len(nos)/4+1] {
		p := d.pages[no]
		plain = plain[:0]
		for i := range p.IDs {
			plain = append(append(plain, byte(p.Said[i])), p.IDs[i][:]...)
		}
		d.based[no] = p.bases != nil
		if p.bases != nil {
			for i := range p.bases {
				plain = append(plain, p.bases[i][:]...)
			}
		}
		if uniform(p, Hole) {
			d.slots[no] = allHoles
			delete(d.pages, no)
			delete(d.used, no)
			continue
		}
		slot, ok := d.slots[no]
		if !ok || slot == allHoles {
			slot = d.next
			d.next++
			d.slots[no] = slot
		}
		if d.file == nil {
			f, err := temp()
			if err != nil {
				return err
			}
			d.file = f
		}
		if _, err := d.file.WriteAt(d.key.Seal(nil, plain, le.AppendUint64(nil, uint64(no))), slot*slotBytes); err != nil {
			return fmt.Errorf("temporary file: %w", err)
		}
		delete(d.pages, no)
		delete(d.used, no)
	}
	d.last = nil
	return nil
}

func (d *Draft) load(no int64, p *DraftPage) error {
	slot, ok := d.slots[no]
	if !ok {
		return nil
	}
	if slot == allHoles {
		for i := range p.Said {
			p.Said[i] = Hole
		}
		return nil
	}
	n := plainBytes
	if d.based[no] {
		n += Positions * 32
	}
	b := make([]byte, n+seal.Overhead)
	if err := readFull(d.file, b, slot*slotBytes); err != nil {
		return fmt.Errorf("temporary file: %w", err)
	}
	plain, err := d.key.Open(nil, b, le.AppendUint64(nil, uint64(no)))
	if err != nil || len(plain) != n {
		return fmt.Errorf("temporary file is not as it was written")
	}
	for i := range p.IDs {
		p.Said[i] = Said(plain[33*i])
		copy(p.IDs[i][:], plain[33*i+1:])
	}
	if n > plainBytes {
		p.bases = new([Positions]chunk.ID)
		for i := range p.bases {
			copy(p.bases[i][:], plain[plainBytes+32*i:])
		}
	}
	return nil
}

func uniform(p *DraftPage, s Said) bool {
	for i := range p.Said {
		if p.Said[i] != s {
			return false
		}
	}
	return true
}
