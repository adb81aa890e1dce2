package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A report is what verify found in a sound directory.
type report struct {
	state   string // "new", "crash-consistent" or "app-consistent"
	last    uint64 // number of the newest record in the log
	lagging bool   // its block had not been written yet
	torn    int64  // bytes of a line behind the last whole one
}

func (r report) String() string { return fmt.Sprintf("%s records %d", r.state, r.last) }

// verify demands that the log has no gap and that each block holds the record
// that the log names last for it. Only the newest record may be in the log and
// not in its block. Where the mark lies the writer held still, and then not
// even that is forgiven.
func verify(dir string) (report, error) {
	log, err := os.ReadFile(filepath.Join(dir, logName))
	if errors.Is(err, fs.ErrNotExist) {
		return report{state: "new"}, nil
	}
	if err != nil {
		return report{}, err
	}
	data, err := os.ReadFile(filepath.Join(dir, blockName))
	if err != nil {
		return report{}, err
	}
	_, err = os.Stat(filepath.Join(dir, markName))
	quiesced := err == nil

	r := report{state: "crash-consistent", torn: int64(len(log) % lineBytes)}
	var want, before [blocks]uint64
	lines := log[:len(log)/lineBytes*lineBytes]
	for at := 0; at < len(lines); at += lineBytes {
		e, err := parseLine(string(lines[at : at+lineBytes]))
		if err != nil {
			// A crash may leave the newest line half written, and no other.
			if at+lineBytes < len(lines) || quiesced {
				return report{}, fmt.Errorf("log at byte %d: %w", at, err)
			}
			r.torn += lineBytes
			break
		}
		if e.seq != r.last+1 {
			return report{}, fmt.Errorf("log at byte %d: record %d follows %d", at, e.seq, r.last)
		}
		before[e.block], want[e.block] = want[e.block], e.seq
		r.last = e.seq
	}
	if len(data) != blocks*blockBytes {
		if r.last == 0 && !quiesced {
			return report{state: "new"}, nil // power went before the first record
		}
		return report{}, fmt.Errorf("%d bytes of blocks, not %d", len(data), blocks*blockBytes)
	}
	for i := range uint32(blocks) {
		seq, ok := seqOf(data[i*blockBytes:][:blockBytes], i)
		switch newest := want[i] == r.last && r.last > 0; {
		case ok && seq == want[i]:
		case newest && !quiesced && (!ok || seq == before[i]):
			r.lagging = true
		case !ok:
			return report{}, fmt.Errorf("block %d is damaged; the log says record %d", i, want[i])
		default:
			return report{}, fmt.Errorf("block %d holds record %d; the log says %d", i, seq, want[i])
		}
	}
	if quiesced {
		if r.torn > 0 {
			return report{}, fmt.Errorf("%d bytes of a torn line in a quiesced log", r.torn)
		}
		r.state = "app-consistent"
	}
	return r, nil
}
