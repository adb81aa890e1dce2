package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
)

// maxFile bounds one file of fill, so that a disk holds several.
const maxFile = 64 << 20

// fill writes files of together size bytes whose names and numbers say what
// they must hold: fill-SEED-NUMBER.
func fill(dir string, size, seed int64) error {
	for n := int64(0); size > 0; n++ {
		length := min(size, maxFile)
		size -= length
		if err := fillFile(filepath.Join(dir, fmt.Sprintf("fill-%d-%d", seed, n)), length, seed, n); err != nil {
			return err
		}
	}
	return nil
}

func fillFile(name string, length, seed, n int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	page := make([]byte, blockBytes)
	for at := int64(0); at < length; at += blockBytes {
		fillPage(page, seed, n, at)
		if _, err := w.Write(page[:min(blockBytes, length-at)]); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Sync()
}

// words make up the half of a page that compresses, as real files do.
var words = strings.Fields("the disk of a machine that nobody thought about until the morning it did not start and was missed by everyone")

// fillPage makes the page at byte at of file n: its place, random bytes, text.
func fillPage(page []byte, seed, n, at int64) {
	r := rand.New(rand.NewPCG(uint64(seed), uint64(n)<<40|uint64(at/blockBytes)))
	binary.LittleEndian.PutUint64(page, uint64(n))
	binary.LittleEndian.PutUint64(page[8:], uint64(at))
	for i := 16; i < blockBytes/2; i += 8 {
		binary.LittleEndian.PutUint64(page[i:], r.Uint64())
	}
	text := page[blockBytes/2:]
	for len(text) > 0 {
		n := copy(text, words[r.IntN(len(words))])
		text = text[n:]
		if len(text) > 0 {
			text[0] = ' '
			text = text[1:]
		}
	}
}

// check reads every file of fill in dir and counts the bytes. The file's
// length is not known here: a shorter file is found by its missing siblings
// only, so callers compare the count with what they filled.
func check(dir string) (int64, error) {
	names, err := filepath.Glob(filepath.Join(dir, "fill-*-*"))
	if err != nil {
		return 0, err
	}
	var total int64
	for _, name := range names {
		n, err := checkFile(name)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

func checkFile(name string) (int64, error) {
	var seed, number int64
	if _, err := fmt.Sscanf(filepath.Base(name), "fill-%d-%d", &seed, &number); err != nil {
		return 0, fmt.Errorf("%s: not a name of fill's: %w", name, err)
	}
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	got, want := make([]byte, blockBytes), make([]byte, blockBytes)
	var at int64
	for {
		n, err := io.ReadFull(r, got)
		if n > 0 {
			fillPage(want, seed, number, at)
			if !bytes.Equal(got[:n], want[:n]) {
				return 0, fmt.Errorf("%s differs at byte %d", name, at)
			}
			at += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return at, nil
		}
		if err != nil {
			return 0, err
		}
	}
}
