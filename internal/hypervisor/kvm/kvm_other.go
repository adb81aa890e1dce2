//go:build !linux

package kvm

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
)

// A Driver exists on Linux only: the disks of a VM are served on its host.
type Driver struct{ hypervisor.Driver }

// Open fails with fault.ErrUnsupported.
func Open(context.Context, Options) (*Driver, error) { return nil, errHere }

// Define fails as Open does.
func (*Driver) Define(context.Context, DefineOptions) (hypervisor.Built, error) {
	return hypervisor.Built{}, errHere
}

// ImageDir fails as Open does.
func (*Driver) ImageDir(context.Context) (string, error) { return "", errHere }

// ResetTracking fails as Open does.
func (*Driver) ResetTracking(context.Context, string, string) error { return errHere }

// WatchdogMain has nothing to watch.
func WatchdogMain(io.Reader, io.Writer) int { return 2 }

var errHere = fmt.Errorf("KVM on %s: %w", runtime.GOOS, fault.ErrUnsupported)

func pciIsStorage(string) bool { return false }
