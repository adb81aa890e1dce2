//go:build !linux

package main

import (
	"context"
	"errors"
)

func (b *bench) vm(context.Context) error { return errors.New("needs libvirt on Linux") }
