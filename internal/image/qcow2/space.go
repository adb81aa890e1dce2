package qcow2

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"github.com/backstay/backstay/internal/fault"
)

// A space hands out the room of a file that is being written, front to back,
// and counts how often each cluster is used. Refcounts are 16 bits wide; a
// block of them that can change no more is written at once, so that the
// counts of a huge image take little memory.
type space struct {
	file *os.File
	bits uint32 // of the cluster size

	mu  sync.Mutex
	end int64 // first byte that was never handed out, at a cluster

	// Compressed clusters share room that was set aside for them. Plain ones
	// are handed out behind it meanwhile.
	aside, asideEnd int64
	spare, spareEnd int64 // what was set aside and not needed, whole clusters

	counts  map[int64][]byte // open refcount blocks by number, as in the file
	written []int64          // offsets of the closed blocks, 0 to len-1
}

const (
	maxAside         = 64      // clusters
	maxRefcountTable = 8 << 20 // bytes; QEMU opens no longer one
)

func newSpace(f *os.File, bits uint32) *space {
	s := &space{file: f, bits: bits, counts: map[int64][]byte{}}
	s.count(0) // the header
	s.end = 1 << bits
	return s
}

func (s *space) cluster() int64 { return 1 << s.bits }

// perBlock is how many clusters a refcount block counts.
func (s *space) perBlock() int64 { return s.cluster() / 2 }

// count adds one to the refcount of cluster n of the file.
func (s *space) count(n int64) error {
	block := s.counts[n/s.perBlock()]
	if block == nil {
		block = make([]byte, s.cluster())
		s.counts[n/s.perBlock()] = block
	}
	p := block[n%s.perBlock()*2:]
	x := binary.BigEndian.Uint16(p)
	if x == 1<<16-1 {
		return fmt.Errorf("cluster %d is used more than %d times", n, x)
	}
	binary.BigEndian.PutUint16(p, x+1)
	return nil
}

// clusters hands out n clusters in one piece.
func (s *space) clusters(n int64) (off int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(n)
}

// take is clusters under the lock.
func (s *space) take(n int64) (off int64, err error) {
	if n<<s.bits <= s.spareEnd-s.spare {
		off = s.spare
		s.spare += n << s.bits
	} else {
		off = s.end
		s.end += n << s.bits
	}
	for i := range n {
		if err := s.count(off>>s.bits + i); err != nil {
			return 0, err
		}
	}
	return off, s.closeBlocks()
}

// packed hands out room for compressed clusters of these lengths in bytes and
// puts their offsets into offs. Most are one behind the other.
func (s *space) packed(lengths []int, offs []int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var left int64 // bytes of clusters that have no place yet
	for i, l := range lengths {
		left += int64(l)
		offs[i] = -1
	}
	if s.asideEnd != s.end {
		// What was set aside cannot grow. Its end is filled with what fits.
		for i, l := range lengths {
			if int64(l) <= s.asideEnd-s.aside {
				left -= int64(l)
				if err := s.place(l, &offs[i]); err != nil {
					return err
				}
			}
		}
		if left > 0 {
			s.aside, s.asideEnd = s.end, s.end
		}
	}
	if need := left - (s.asideEnd - s.aside); need > 0 {
		// The more is set aside at a time the fewer ends are lost, but what
		// is not needed in the end must be little compared with the file.
		n := max((need+s.cluster()-1)>>s.bits, min(s.end>>s.bits/128, maxAside))
		s.asideEnd += n << s.bits
		s.end = s.asideEnd
	}
	for i, l := range lengths {
		if offs[i] < 0 {
			if err := s.place(l, &offs[i]); err != nil {
				return err
			}
		}
	}
	return s.closeBlocks()
}

// place gives a compressed cluster of l bytes the next room that is set aside.
func (s *space) place(l int, off *int64) error {
	*off = s.aside
	s.aside += int64(l)
	for c := *off >> s.bits; c <= (s.aside-1)>>s.bits; c++ {
		if err := s.count(c); err != nil {
			return err
		}
	}
	return nil
}

// release ends the compressed clusters: what is set aside for them is there
// for others.
func (s *space) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	free := (s.aside + s.cluster() - 1) &^ (s.cluster() - 1)
	if s.asideEnd == s.end {
		s.end = free
	} else {
		s.spare, s.spareEnd = free, s.asideEnd
	}
	s.aside, s.asideEnd = 0, 0
}

// closeBlocks writes the blocks behind which all room has been handed out.
func (s *space) closeBlocks() error {
	for {
		final := s.end
		if s.aside < s.asideEnd {
			final = s.aside
		}
		if s.spare < s.spareEnd {
			final = s.spare
		}
		n := int64(len(s.written))
		if final>>s.bits < (n+1)*s.perBlock() {
			return nil
		}
		off := s.end
		s.end += s.cluster()
		if err := s.count(off >> s.bits); err != nil {
			return err
		}
		if err := s.writeBlock(n, off); err != nil {
			return err
		}
	}
}

// writeBlock writes block n, the next one, to off.
func (s *space) writeBlock(n, off int64) error {
	block := s.counts[n]
	if block == nil {
		block = make([]byte, s.cluster())
	}
	if _, err := s.file.WriteAt(block, off); err != nil {
		return err
	}
	delete(s.counts, n)
	s.written = append(s.written, off)
	return nil
}

// flush writes the remaining blocks and the table of them all, and gives the
// table's place and length. Nothing may be handed out afterwards.
func (s *space) flush() (table, tableClusters int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// The blocks and the table count themselves, so their number is what no
	// longer grows.
	have := int64(len(s.written))
	blocks := have
	for {
		total := s.end>>s.bits + blocks - have + tableClusters
		b := max((total+s.perBlock()-1)/s.perBlock(), have)
		t := (b*8 + s.cluster() - 1) >> s.bits
		if b == blocks && t == tableClusters {
			break
		}
		blocks, tableClusters = b, t
	}
	if blocks*8 > maxRefcountTable {
		return 0, 0, fmt.Errorf("qcow2 with clusters of %d bytes cannot hold a file of %d bytes: %w", s.cluster(), s.end, fault.ErrUnsupported)
	}
	first := s.end
	n := blocks - have + tableClusters
	s.end += n << s.bits
	for i := range n {
		if err := s.count(first>>s.bits + i); err != nil {
			return 0, 0, err
		}
	}
	for b := have; b < blocks; b++ {
		if err := s.writeBlock(b, first+(b-have)<<s.bits); err != nil {
			return 0, 0, err
		}
	}
	table = first + (blocks-have)<<s.bits
	p := make([]byte, tableClusters<<s.bits)
	for i, off := range s.written {
		binary.BigEndian.PutUint64(p[i*8:], uint64(off))
	}
	_, err = s.file.WriteAt(p, table)
	return table, tableClusters, err
}
