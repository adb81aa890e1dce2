//go:build !linux

package demo

import (
	"context"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
)

func run(context.Context, Options) error {
	return fmt.Errorf("the demo's guest needs libvirt on Linux: %w", fault.ErrUnsupported)
}
