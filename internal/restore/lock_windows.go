package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/windows"

	"github.com/backstay/backstay/internal/fault"
)

// lockDir locks dir by a file beside it that nobody else can open and that
// goes away with its handle.
func lockDir(dir string) (*os.File, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	name, err := windows.UTF16PtrFromString(dir + ".lock")
	if err != nil {
		return nil, err
	}
	h, err := windows.CreateFile(name, windows.GENERIC_READ|windows.GENERIC_WRITE|windows.DELETE, 0, nil,
		windows.OPEN_ALWAYS, windows.FILE_ATTRIBUTE_NORMAL|windows.FILE_FLAG_DELETE_ON_CLOSE, 0)
	if errors.Is(err, windows.ERROR_SHARING_VIOLATION) || errors.Is(err, windows.ERROR_DELETE_PENDING) {
		return nil, fmt.Errorf("%s: %w by another restore", dir, fault.ErrLocked)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(h), dir+".lock"), nil
}
