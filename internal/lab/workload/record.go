package main

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strconv"
	"strings"
)

const (
	blockBytes = 4096
	blocks     = 1024
	lineBytes  = 64

	logName   = "log"
	blockName = "blocks"
	markName  = "quiesced"
)

// An entry is one line of the log: the record with number seq went to block.
type entry struct {
	seq   uint64
	block uint32
}

// line is exactly lineBytes long: numbers, checksum, filling, newline.
func (e entry) line() string {
	head := fmt.Sprintf("%016d %08d ", e.seq, e.block)
	return fmt.Sprintf("%s%08x %s\n", head, crc32.ChecksumIEEE([]byte(head)), strings.Repeat(".", lineBytes-len(head)-10))
}

func parseLine(line string) (entry, error) {
	if len(line) != lineBytes {
		return entry{}, fmt.Errorf("a line of %d bytes", len(line))
	}
	seq, err := strconv.ParseUint(line[:16], 10, 64)
	if err != nil {
		return entry{}, err
	}
	block, err := strconv.ParseUint(line[17:25], 10, 32)
	if err != nil {
		return entry{}, err
	}
	e := entry{seq, uint32(block)}
	if block >= blocks || e.line() != line {
		return entry{}, fmt.Errorf("line %d has a wrong checksum", seq)
	}
	return e, nil
}

// next chooses where record seq goes: all over the file, and the same place
// each time, so that a repeated write is no other write.
func next(seq uint64) entry {
	return entry{seq, uint32(rand.New(rand.NewPCG(seq, 7)).IntN(blocks))}
}

// content is the block of e: its numbers, half random and half plain bytes,
// and a checksum. Record 0 is the block as it was never written.
func (e entry) content() []byte {
	b := make([]byte, blockBytes)
	if e.seq == 0 {
		return b
	}
	binary.LittleEndian.PutUint64(b, e.seq)
	binary.LittleEndian.PutUint32(b[8:], e.block)
	r := rand.New(rand.NewPCG(e.seq, uint64(e.block)))
	for i := 16; i < blockBytes/2; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	for i := blockBytes / 2; i < blockBytes-4; i++ {
		b[i] = byte('a' + e.seq%26)
	}
	binary.LittleEndian.PutUint32(b[blockBytes-4:], crc32.ChecksumIEEE(b[:blockBytes-4]))
	return b
}

// seqOf reads which record a block holds. ok is false for a block that is
// neither whole nor empty.
func seqOf(b []byte, block uint32) (seq uint64, ok bool) {
	seq = binary.LittleEndian.Uint64(b)
	return seq, string(entry{seq, block}.content()) == string(b)
}
