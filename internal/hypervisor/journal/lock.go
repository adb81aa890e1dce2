package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

// A Lock keeps other runs away from one machine, in this process and in others
// that share the directory. It ends with the process.
type Lock struct{ f *os.File }

// TryLock locks machine in dir, or gives a nil Lock and who holds it. what is
// told to others, after our process's number.
func TryLock(dir, machine, what string) (l *Lock, holder string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, "", fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, machine+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, "", fmt.Errorf("state directory: %w", err)
	}
	if err := lockFile(f); err != nil {
		defer f.Close()
		if !errors.Is(err, fault.ErrLocked) {
			return nil, "", fmt.Errorf("lock machine %s: %w", machine, err)
		}
		var text [64]byte
		n, _ := f.ReadAt(text[:], 0)
		return nil, strings.TrimSpace(string(text[:n])), nil
	}
	f.Truncate(0)
	fmt.Fprintf(f, "process %d%s\n", os.Getpid(), what)
	return &Lock{f}, "", nil
}

// Unlock may be called twice. The file stays: removing it would let two
// processes hold locks on two files of one name.
func (l *Lock) Unlock() { l.f.Close() }
