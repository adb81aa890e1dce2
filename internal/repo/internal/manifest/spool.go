package manifest

import (
	"fmt"
	"io"
	"os"
)

// spoolMemory is how much of a Spool stays in memory, in bytes.
const spoolMemory = 8 << 20

// A Spool is a file being written: in memory while it is small, and then in a
// temporary file. Nothing is written to it but what is sealed.
type Spool struct {
	mem   []byte
	file  *os.File
	n     int64
	limit int // spoolMemory, less in tests
}

// NewSpool makes an empty one.
func NewSpool() *Spool { return &Spool{limit: spoolMemory} }

// Size is how many bytes were written.
func (s *Spool) Size() int64 { return s.n }

func (s *Spool) Write(p []byte) (int, error) {
	if s.file == nil && len(s.mem)+len(p) <= s.limit {
		s.mem = append(s.mem, p...)
		s.n += int64(len(p))
		return len(p), nil
	}
	if s.file == nil {
		f, err := temp()
		if err != nil {
			return 0, err
		}
		s.file = f
		if _, err := f.Write(s.mem); err != nil {
			return 0, fmt.Errorf("temporary file: %w", err)
		}
		s.mem = nil
	}
	n, err := s.file.Write(p)
	s.n += int64(n)
	if err != nil {
		err = fmt.Errorf("temporary file: %w", err)
	}
	return n, err
}

// ReadAt reads what was written.
func (s *Spool) ReadAt(p []byte, off int64) (int, error) {
	if s.file != nil {
		return s.file.ReadAt(p, off)
	}
	if off >= int64(len(s.mem)) {
		return 0, io.EOF
	}
	n := copy(p, s.mem[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Close removes the temporary file; it may be called twice.
func (s *Spool) Close() error {
	s.mem = nil
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return drop(f)
}

// temp makes a temporary file and removes its name at once where the system
// allows that, so that it is gone however the process ends.
func temp() (*os.File, error) {
	f, err := os.CreateTemp("", "backstay-manifest-*")
	if err != nil {
		return nil, fmt.Errorf("temporary file: %w", err)
	}
	os.Remove(f.Name())
	return f, nil
}

func drop(f *os.File) error {
	err := f.Close()
	os.Remove(f.Name()) // where an open file keeps its name
	return err
}
