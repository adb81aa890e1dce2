//go:build !unix

package open_test

import "testing"

func makeFifo(*testing.T, string) {}

func makeSpecial(*testing.T, string, string) {}
