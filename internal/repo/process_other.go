//go:build !linux

package repo

import "errors"

// processTable is not known here: whether an owner lives is told by its beat.
func processTable() (name string, ok bool) { return "", false }

func processStart(int) (ticks int64, err error) { return 0, errors.ErrUnsupported }
