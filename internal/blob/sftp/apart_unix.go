//go:build unix

package sftp

import (
	"os/exec"
	"syscall"
)

// apart keeps a ^C on the terminal from ssh: whoever is interrupted still has
// to clean up through it.
func apart(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
