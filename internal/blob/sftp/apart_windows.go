package sftp

import (
	"os/exec"
	"syscall"
)

// apart keeps a ^C on the console from ssh: whoever is interrupted still has
// to clean up through it.
func apart(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP}
}
