//go:build !linux

package demo

import (
	"context"
	"fmt"
	"os/exec"

	"github.com/backstay/backstay/internal/fault"
)

func run(context.Context, Options) error {
	return fmt.Errorf("the demo's guest needs libvirt on Linux: %w", fault.ErrUnsupported)
}

func apart(*exec.Cmd) {}
