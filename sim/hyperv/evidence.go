package hyperv

import (
	"fmt"
	"strings"
)

// Kinds of evidence.
const (
	Recorded   = "recorded"   // a trace of a real host is in the tree
	Documented = "documented" // Microsoft's or a standard's page says so
	Source     = "source"     // others' programs depend on it, or their authors saw it
	Guess      = "guess"      // nobody said so
)

// A Behaviour is something that the simulator does, and on what it rests.
type Behaviour struct {
	Area, What, Evidence, By string
}

// Behaviours are all that a client may come to depend on. docs/design/hyperv-evidence.md
// shows them.
var Behaviours = []Behaviour{
	{"connection", "authentication belongs to the connection; on another one a request gets 401 with the schemes on offer", Documented, "MS-NTHT; RFC 4559"},
	{"connection", "NTLM comes bare or in SPNEGO under `Negotiate`; both are taken", Source, "pywinrm sends the one, pyspnego and GSS-NTLMSSP the other"},
	{"connection", "a client need not send an integrity code (MIC); a wrong one is refused", Source, "Azure/go-ntlmssp sends none"},
	{"connection", "after `mechListMIC` the RC4 streams begin again and the sequence numbers go on", Documented, "MS-SPNG 3.2.5.1; pyspnego and GSS-NTLMSSP agree"},
	{"connection", "channel binding is the certificate's hash (`tls-server-end-point`); a wrong one is refused, none only where it is demanded", Documented, "RFC 5929; WinRM's CbtHardeningLevel"},
	{"connection", "Basic only over TLS, and only where it is allowed", Documented, "WinRM's defaults"},
	{"connection", "Basic's password may come in UTF-8 or Latin-1", Guess, ""},
	{"connection", "over HTTP every message is sealed in `multipart/encrypted`, headers of its parts begin with a tab", Source, "pywinrm looks for the tab; MS-WSMV 2.2.9.1"},
	{"connection", "over HTTP a message in the clear gets 500 without a body", Guess, "AllowUnencrypted is false by default; pywinrm's users report 500"},
	{"connection", "a message whose signature is wrong gets 400, and the session ends", Guess, ""},
	{"connection", "an empty POST of an authenticated connection gets 200", Source, "pywinrm and masterzen/winrm begin so"},
	{"envelope", "answers have RelatesTo", Documented, "WS-Addressing; pypsrp refuses others"},
	{"envelope", "faults are HTTP 500, with a subcode and a WSManFault with its code", Source, "traces in pywinrm's and pypsrp's tests"},
	{"envelope", "codes of WSManFault", Documented, "the SDK's list of errors"},
	{"envelope", "a WMI error stands in ProviderFault as __ExtendedStatus", Source, "traces that users posted"},
	{"envelope", "a header that must be understood and is unknown is refused", Documented, "SOAP 1.2"},
	{"envelope", "an answer larger than MaxEnvelopeSize, or than 500 KB, is a fault EncodingLimit", Documented, "DSP0226 R6.2; WinRM's MaxEnvelopeSizekb"},
	{"envelope", "the fault's code is 2150858790", Guess, "the SDK's text of that code fits"},
	{"envelope", "a MaxEnvelopeSize below 8192 is a fault", Documented, "DSP0226"},
	{"envelope", "a method that takes longer than OperationTimeout is a fault TimedOut", Source, "pywinrm's tests have the trace"},
	{"envelope", "`__cimnamespace` among the selectors of a WMI URI is a fault", Source, "microsoft/omi #398"},
	{"instances", "a property without a value is there with xsi:nil", Documented, "MS-WSMV; DSP0230"},
	{"instances", "instants are cim:Datetime in ISO 8601, intervals cim:Interval as a duration", Documented, "DSP0230"},
	{"instances", "a service is found by CreationClassName alone", Source, "libvirt, go-wsman"},
	{"instances", "every other instance needs all its keys", Guess, ""},
	{"instances", "Put is refused: Hyper-V's objects change by methods", Documented, "the class pages have access types read-only"},
	{"query", "WQL only on the URI that ends in `*`", Source, "libvirt asks so; go-wsman saw class URIs refused; the SDK has error 2150859003"},
	{"query", "references cannot be compared", Source, "go-wsman's notes"},
	{"query", "ASSOCIATORS OF goes through the same dialect", Source, "libvirt"},
	{"query", "named columns come as w:XmlFragment", Source, "winrm's command line shows it"},
	{"query", "without MaxElements one item comes at a time", Documented, "WS-Enumeration 3.2"},
	{"query", "WHERE takes = <> and IS NULL, joined by AND; nothing else", Guess, "narrower than WQL"},
	{"method", "a reference in a:EndpointReference is a SchemaValidationError", Source, "go-wsman's notes"},
	{"method", "an embedded instance as elements is a SchemaValidationError; it must be CIM-XML text", Source, "go-wsman's notes; libvirt"},
	{"method", "an embedded instance with a TYPE other than the class's returns 32768", Source, "go-wsman's notes"},
	{"method", "a property that the class has not returns 32768, too", Guess, ""},
	{"method", "names and types of classes, properties, methods and parameters", Documented, "windows/win32/hyperv_v2, transcribed into classes.txt"},
	{"method", "which properties are keys", Documented, "the CIM schema; Microsoft's pages are incomplete"},
	{"job", "methods answer 4096 with the job alone, Resulting… is nil", Source, "go-wsman's notes; Bareos finds the snapshot through the job"},
	{"job", "Msvm_AffectedJobElement has rows only after the job has completed, the new element with effect 5", Source, "go-wsman's notes"},
	{"job", "the VM itself is among the rows, with effect 0", Guess, ""},
	{"job", "while a job of a VM runs, a further method on it returns 32775", Source, "go-wsman saw it for DestroySystem beside a deletion"},
	{"job", "a failed job is in state 10, with ErrorDescription and GetErrorEx", Documented, "Msvm_ConcreteJob"},
	{"job", "CreateVirtualHardDisk's job is an Msvm_StorageJob", Documented, "Msvm_StorageJob"},
	{"job", "jobs stay to be asked for; the oldest of more than 500 go", Guess, "TimeBeforeRemoval says 5 minutes"},
	{"checkpoint", "SnapshotType 32768 makes a recovery checkpoint of type Microsoft:Hyper-V:Snapshot:Recovery", Source, "Microsoft's sample, Bareos, nxmBackup"},
	{"checkpoint", "the disks' files stand still, the VM writes to new .avhdx over them", Documented, "Hyper-V-Backup-2016.md"},
	{"checkpoint", "the name of the new file is the disk's with a GUID", Source, "every host's file listing"},
	{"checkpoint", "application consistency fails where the guest has no backup service and runs", Guess, "hosts may fall back by themselves"},
	{"checkpoint", "a ConsistencyLevel or GuestBackupType above 2 returns 32773", Guess, "the page names 0, 1 and 2"},
	{"guest", "a service's OperationalStatus is 2 works, 3 another version that works, 7 one that does not, 12 no contact, 13 lost", Documented, "Msvm_VssComponent, Msvm_KvpExchangeComponent"},
	{"guest", "a service that is switched off in the VM's settings is there with EnabledState 3 and no contact", Guess, ""},
	{"guest", "a guest tells of itself by OSName, OSVersion, IntegrationServicesVersion and others, Windows by OSPlatformId 2, too", Documented, "Msvm_KvpExchangeComponent; for Linux its hv_kvp_daemon"},
	{"guest", "services are there while the VM runs alone", Guess, ""},
	{"checkpoint", "the settings can be renamed by ModifySystemSettings", Source, "go-wsman's notes"},
	{"checkpoint", "several recovery checkpoints of one VM can be", Guess, ""},
	{"checkpoint", "taking one away merges the file after it into its own, within the job", Documented, "Hyper-V-Backup-2016.md; that it is within the job is a guess"},
	{"checkpoint", "the .vmcx holds text of the simulator's own, with a sum: a real one is refused, and a real host refuses this one", Guess, "the real content is binary and nowhere described"},
	{"checkpoint", "a user's checkpoint is the Parent of the settings that are based on it, a recovery checkpoint is not", Guess, "Msvm_VirtualSystemSettingData.Parent says what it is for, not for which kinds"},
	{"checkpoint", "ApplySnapshot needs a VM that is off or saved, else 32775; the VM is off then, with the checkpoint's settings and its own name", Guess, "the page has the code, not when"},
	{"checkpoint", "Msvm_LastAppliedSnapshot shows which was applied last", Documented, "Msvm_LastAppliedSnapshot"},
	{"checkpoint", "applying one leaves RCT ids as they were: they tell what guests wrote, and not that a disk went back", Guess, "the worst that a host could do"},
	{"checkpoint", "DestroySnapshotTree takes all that are based on one with it", Documented, "Msvm_VirtualSystemSnapshotService.DestroySnapshotTree"},
	{"checkpoint", "ClearSnapshotState takes a checkpoint's memory, IsSaved is false then", Documented, "Msvm_VirtualSystemSnapshotService.ClearSnapshotState; IsSaved is a guess"},
	{"checkpoint", "with a disk that is passed through or a VHD set it fails in the job, unless IgnoreNonSnapshottableDisks", Documented, "Msvm_VirtualSystemSnapshotSettingData; that VHD sets count is a guess"},
	{"disk", "a disk that is passed through is a Physical Disk Drive whose HostResource is the path of an Msvm_DiskDrive", Source, "os-win; Microsoft's storage sample"},
	{"disk", "a VHD set is a .vhds with an .avhdx beside it", Source, "every host's file listing; its content is not simulated"},
	{"disk", "ResizeVirtualHardDisk makes a VHDX larger, in use or not, and not while there are checkpoints; it never shrinks one", Source, "Resize-VHD's page: online since 2012 R2; the codes are a guess"},
	{"disk", "tracking goes on when a disk grew", Guess, ""},
	{"disk", "VHDs have checkpoints as .avhd beside them, and no RCT ids", Documented, "Hyper-V-Backup-2016.md for RCT; the name is in every host's file listing"},
	{"disk", "a VHD in a VM of generation 2 is refused", Documented, "Hyper-V's page on generations; the code is a guess"},
	{"reference point", "ConvertToReferencePoint takes recovery checkpoints only and deletes them", Documented, "Msvm_VirtualSystemSnapshotService.ConvertToReferencePoint"},
	{"reference point", "its arrays are of one length, by disk; disks are named by InstanceIDs of the VM's own allocations", Source, "nxmBackup, Bareos"},
	{"reference point", "the form of an RCT id", Guess, ""},
	{"reference point", "configurations below version 6.2 have no RCT ids", Guess, "Hyper-V-Backup-2016.md names no number"},
	{"changes", "GetVirtualDiskChanges answers at once, with 0", Source, "nxmBackup, Bareos; the page allows a job"},
	{"changes", "on a checkpoint's file it tells what changed up to the checkpoint", Source, "Microsoft's sample"},
	{"changes", "ByteLength may be the disk's size", Source, "nxmBackup; the page says less"},
	{"changes", "an unknown LimitId returns 32773, an unknown file 32779", Guess, "the page has the codes, not which is for what"},
	{"changes", "ranges are whole granules of 64 KiB, neighbours merged", Guess, "the granule can be chosen"},
	{"system", "DefineSystem, AddResourceSettings with Parent as object path, DestroySystem", Source, "go-wsman; libvirt"},
	{"system", "a Parent that is no path returns 32773", Source, "go-wsman's notes"},
	{"system", "settings that cannot be changed are accepted and ignored", Source, "go-wsman's notes"},
	{"system", "a VM that runs cannot be destroyed: 32775", Documented, "DestroySystem"},
	{"system", "a destroyed VM's definition files go, its disks' files stay", Documented, "Remove-VM; for DestroySystem it is a guess"},
	{"system", "a further disk, controller or connection in a taken slot, beyond the last one, or on what is no drive for it fails in the job", Guess, ""},
	{"system", "generation 1 has two IDE controllers for ever, generation 2 none and no emulated network adapter", Documented, "Hyper-V's page on generations; how hosts refuse is a guess"},
	{"system", "secure boot is for generation 2, BootOrder has four different values, a name 100 characters at most", Documented, "Msvm_VirtualSystemSettingData; how hosts refuse is a guess"},
	{"system", "firmware and controllers of a VM that runs cannot be changed; a disk's file can only while it is off and has no checkpoints", Guess, "Hyper-V Manager offers no more"},
	{"system", "removing a resource removes what hangs on it", Guess, ""},
	{"system", "a state that cannot be reached from the present one, or is it already, returns 32775", Source, "os-win takes 32775 for a VM that is there already"},
	{"system", "starting fails in the job where a file of a disk is missing: 0x80070002", Source, "messages that users posted"},
	{"system", "a file that another VM has as a disk, or two drives of one, is refused: 0x80070020", Guess, "hosts hold files of VMs that run; of others they may allow it"},
	{"system", "a file that is no VHDX, or whose parent is missing or another, is refused: 0x80070570, 0xC03A0004, 0xC03A000D, 0xC03A000E", Guess, "the SDK's list has the codes, users posted some"},
	{"system", "new VMs and disks go where Msvm_VirtualSystemManagementServiceSettingData says", Documented, "Msvm_VirtualSystemManagementServiceSettingData"},
	{"network", "HostResource is the path of an Msvm_VirtualEthernetSwitch, LastKnownSwitchName follows", Documented, "Msvm_EthernetPortAllocationSettingData"},
	{"network", "a connection with EnabledState 3 needs no switch", Documented, "Msvm_EthernetPortAllocationSettingData"},
	{"network", "an adapter without a MAC address, or with one of zeros alone, gets one of the host's range when its VM starts, if it is not static", Documented, "Set-VMNetworkAdapter's DynamicMacAddress; Msvm_VirtualSystemManagementServiceSettingData has the range; that zeros are none, Get-VMNetworkAdapter shows of VMs that never ran, and that they can be set again is a guess"},
	{"system", "a Fibre Channel adapter is an Msvm_SyntheticFcPortSettingData, which is no Msvm_ResourceAllocationSettingData: a question for those does not list it", Documented, "Msvm_SyntheticFcPortSettingData derives from CIM_ResourceAllocationSettingData; that it can be removed like others is a guess"},
	{"network", "connecting to a switch that is not there fails in the job", Guess, ""},
	{"planned", "ImportSystemDefinition's job makes an Msvm_PlannedComputerSystem, found as what it affected with effect 5", Source, "Bareos, nxmBackup"},
	{"planned", "its settings are of type Microsoft:Hyper-V:System:Planned and found by Msvm_SettingsDefineState", Source, "Microsoft's sample, nxmBackup; the association's page names Msvm_ComputerSystem alone"},
	{"planned", "the .vmcx of a recovery checkpoint can be imported, the name and the paths in it are the checkpoint's", Source, "nxmBackup imports what it saved of the checkpoint; the name is a guess"},
	{"planned", "a definition file that a VM or a checkpoint has is in use: 32779", Documented, "ImportSystemDefinition"},
	{"planned", "a damaged, foreign or missing file fails in the job", Guess, ""},
	{"planned", "an identity that a VM has already fails in the job", Source, "the message is in users' posts; at which step is a guess"},
	{"planned", "resources get the new identity in their ids, MAC addresses stay", Guess, "the worst that can be; Microsoft's Virtual PC Guy tells that a host renews a chosen one at a start outside its range"},
	{"planned", "a connection finds its switch by its name, too", Source, "programs that move VMs between hosts match names"},
	{"planned", "a checkpoint that the settings are based on is looked for in SnapshotFolder; one that is not there has type Snapshot:Missing and must be imported or destroyed", Documented, "ImportSystemDefinition, Msvm_VirtualSystemSettingData.VirtualSystemType"},
	{"planned", "a planned system takes disks and switches that are not there until it is validated", Source, "Compare-VM's page: import, look, mend, import"},
	{"planned", "ConfigurationDataRoot can be set by ModifySystemSettings before a VM is realized, and is ignored afterwards", Source, "nxmBackup sets it"},
	{"planned", "ValidatePlannedSystem's job does its work and tells what is wrong by GetErrorEx", Source, "Microsoft's sample prints the errors of a job that succeeded"},
	{"planned", "it ends in state 32768, completed with warnings, then", Guess, "it may be 7"},
	{"planned", "a missing switch has MessageID 33012", Documented, "Compare-VM's page"},
	{"planned", "a disk that cannot be used has MessageID 40010", Guess, "users posted it of DVD images"},
	{"planned", "RealizePlannedSystem validates, too, and fails in the job with those errors", Documented, "RealizePlannedSystem"},
	{"planned", "it copies run-time and guest state from beside the imported file, and makes the VM of the same GUID", Documented, "RealizePlannedSystem; that the GUID stays is a guess"},
	{"planned", "DestroySystem takes a planned system away and leaves the files", Documented, "DestroySystem's example; of the files it is a guess"},
	{"cluster", "classes of root\\MSCluster with OwnerNode, State of nodes, GroupType 111 for VMs", Documented, "previous-versions/windows/desktop/cluswmi"},
	{"cluster", "a VM's resource is of Type `Virtual Machine` and has its GUID in PrivateProperties.VmID", Source, "Windows Admin Center's and microsoft/wmi's queries"},
	{"cluster", "WQL asks for PrivateProperties.VmID in WHERE", Source, "Windows Admin Center does"},
	{"cluster", "an object within an instance comes as elements with a type of its own", Guess, "MS-WSMV shows embedded objects so; none of this class"},
	{"cluster", "a host that is no node has no namespace root\\MSCluster: DestinationUnreachable with WMI's 0x8004100e", Guess, "WMI's code is documented, the fault around it is not"},
	{"cluster", "a node lists its own VMs alone, and has a VM from the moment that it moved", Source, "backupzit asks every node and goes by the owner"},
	{"cluster", "a VM moves with its checkpoint, and its files can be read on", Source, "backupzit 0.48.1 removes it on the new node, having read on"},
	{"cluster", "reference points and RCT ids move along and go on", Guess, "RCT files lie beside the disks; nobody says"},
	{"cluster", "a VM does not move while a job of it runs", Guess, ""},
	{"cluster", "VMs of a node that goes down start on another, with checkpoints and tracking", Guess, "users post that checkpoints of backups that died stay; of nodes that went down nobody says"},
	{"cluster", "files of a shared volume are reached through every node, under the same name and with the same times", Documented, "Microsoft's pages on Cluster Shared Volumes; of the times it is a guess"},
	{"cluster", "a node's jobs are known to that node alone", Guess, ""},
}

// Table is Behaviours as Markdown.
func Table() string {
	var b strings.Builder
	b.WriteString("| area | what the simulator does | evidence | by |\n|---|---|---|---|\n")
	for _, x := range Behaviours {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", x.Area, x.What, x.Evidence, x.By)
	}
	return b.String()
}
