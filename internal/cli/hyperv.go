package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/wsman"
)

// hostCredentials are the password of a hypervisor's host.
func hostCredentials() credentials { return credentials{to: "host-"} }

func addHostFlags(f *pflag.FlagSet, c *credentials) {
	f.StringVar(&c.passwordFile, c.to+"password-file", "",
		fmt.Sprintf("file with the password for a Hyper-V host (or %s, %s, or a prompt)", c.env("PASSWORD_FILE"), c.env("PASSWORD")))
}

func (a *app) openHyperV(ctx context.Context, s source, o driverOptions) (*hyperv.Driver, error) {
	password, err := a.passphrase(&o.host, fmt.Sprintf("Password of %s at %s: ", s.host.User.Username(), s.host.Hostname()))
	if err != nil {
		return nil, err
	}
	h := o.hyperv
	h.Host, h.Password, h.StateDir, h.Log = s.host, password, a.stateDir, a.log()
	return hyperv.Open(ctx, h)
}

// hypervHint is what to do about what only Hyper-V hosts answer, "" for
// nothing.
func hypervHint(err error) string {
	var cert *wsman.CertificateError
	var who *wsman.SignInError
	var answer *wsman.AnswerError
	var refused *wsman.Fault
	var cut *wsman.ConnectionError
	var files *hyperv.FilesError
	var node *hyperv.NodeError
	switch {
	case errors.As(err, new(*hyperv.UnseenError)):
		return "write its GUID instead of its name: hyperv://USER@HOST/GUID; or see why that node can't be asked"
	case errors.As(err, &node):
		return fmt.Sprintf("if %s is reached by another name or port, write the source with ?node=%[1]s=HOST:PORT; its certificate's fingerprint may stand beside the first in another fingerprint=", node.Node)
	case errors.As(err, new(*hyperv.ClusterError)):
		return `see on the host what "Get-ClusterNode" says; a VM that is named by its GUID is found without asking the cluster where the source's host has it`
	case errors.As(err, &cert):
		return fmt.Sprintf("compare that fingerprint with the certificate of the WinRM listener on the host itself; if it is the same, write the source with ?fingerprint=sha256:%s, or name who signed it with ?ca=FILE",
			strings.ReplaceAll(cert.Fingerprint.String(), ":", ""))
	case errors.As(err, &who):
		return "check the user (DOMAIN%5CUSER for one of a domain) and --host-password-file; a local account other than Administrator also has to be in the groups Hyper-V Administrators and Remote Management Users"
	case errors.As(err, new(*hyperv.NoDiskError)):
		return `a folder that no share reaches needs ?share=C:\VMs=SHARE in the source, one of another server ?smb=SERVER&share=\\SERVER\VMs=SHARE; leave out fewer disks with --exclude-disk`
	case errors.As(err, new(*hyperv.DiskError)) && (errors.Is(err, fault.ErrCorrupt) || errors.Is(err, fault.ErrNotFound)):
		return `the disk's files on the host do not hold together; the repository is not touched: see there with "Get-VHD" and "Test-VHD" which file is damaged or missing`
	case errors.As(err, &files) && errors.Is(err, fault.ErrDenied):
		return `C$ and its like are for administrators alone: give the user a share of the VMs' folder, and write the source with ?share=C:\VMs=SHARE`
	case errors.As(err, &files):
		return `the disks are read over SMB, port 445 of the host: see that it is open, or write the source with ?smb=HOST:PORT; a folder that no share reaches needs ?share=C:\VMs=SHARE`
	case errors.As(err, &refused) && errors.Is(err, fault.ErrDenied):
		return "put the user into the groups Hyper-V Administrators and Remote Management Users on the host"
	case errors.As(err, &cut):
		return `see that WinRM listens there: "winrm enumerate winrm/config/listener" on the host; hyperv:// is HTTPS on port 5986, hyperv+http:// is HTTP with sealed messages on 5985`
	case errors.As(err, &answer), errors.Is(err, wsman.ErrProtocol):
		return "what answers there is not WinRM: check host and port, and that no proxy stands in between"
	case errors.Is(err, hyperv.ErrOnlySavedState):
		return "--allow-saved-state takes a checkpoint with the guest's memory instead; otherwise back it up from within the guest"
	case errors.Is(err, hyperv.ErrHostSpace):
		return "make room on that volume of the host: its VMs are paused when it is full; nothing of the backup is left there"
	case errors.Is(err, hyperv.ErrDelta):
		return "back it up at a quieter time, or allow more with --max-delta; nothing of the backup is left on the host"
	case errors.As(err, new(*hyperv.AmbiguousError)):
		return "write its GUID instead of its name: hyperv://USER@HOST/GUID"
	case errors.As(err, new(*hyperv.UnknownError)):
		return "if no other product was at it, delete that checkpoint on the host: Get-VMSnapshot -VMName NAME -SnapshotType Recovery | Remove-VMSnapshot; it grows until then"
	case errors.As(err, new(*hyperv.GradeError)):
		return "see in the guest that the Hyper-V integration services run (Volume Shadow Copy Requestor, Data Exchange), and what its event log says of VSS; or allow a lower grade with --consistency"
	}
	return ""
}
