//go:build !linux

package open

import "os"

const nonblock = 0

func openBeneath(dir, rel string) (*os.File, error) { return openInRoot(dir, rel) }
