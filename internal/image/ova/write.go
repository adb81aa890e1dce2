package ova

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/xml"
	"fmt"
	"hash"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// A Writer writes an appliance of one disk:
//
//	NAME.ovf | NAME.mf | NAME-disk1.vmdk | two empty blocks
//
// This is the order that the standard wants and importers need that read from
// a network. How long descriptor and manifest get is known from the start, so
// the disk goes to its place at once, and they are put before it in the end.
type Writer struct {
	file   *os.File
	name   string
	now    time.Time
	disk   *vmdk.Stream
	sum    hash.Hash
	ovf    int64 // bytes of the descriptor
	closed bool
}

var _ image.Writer = (*Writer)(nil)

// Create makes the file path, which must not exist. Only a compressed disk is
// in an appliance, and so only a Level may be chosen.
func Create(path string, o image.CreateOptions) (image.Writer, error) {
	switch {
	case o.Variant != "" && o.Variant != vmdk.StreamOptimized:
		return nil, fmt.Errorf("an appliance's disk is %s, not %s", vmdk.StreamOptimized, o.Variant)
	case o.Parent != "":
		return nil, fmt.Errorf("an appliance has no parent, so not %q either", o.Parent)
	case o.VirtualBytes < 0 || o.VirtualBytes > 1<<55:
		return nil, fmt.Errorf("an appliance's disk of %d bytes", o.VirtualBytes)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	w := &Writer{file: f, name: innerName(path), now: time.Now(), sum: sha256.New()}
	// No numbers are longer than these.
	w.ovf = int64(len(w.descriptor(math.MaxInt64, math.MaxInt64, math.MaxInt64)))
	if w.disk, err = vmdk.NewStream(f, w.diskAt(), w.diskName(), o, w.sum); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	return w, nil
}

// innerName is what the files in the archive at path are called: like it, if
// that is a name that needs no escaping in a URI and fits a tar's header.
func innerName(path string) string {
	name := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	odd := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	}
	if name == "" || name[0] == '.' || len(name) > 64 || strings.ContainsFunc(name, odd) {
		return "appliance"
	}
	return name
}

func (w *Writer) ovfName() string      { return w.name + ".ovf" }
func (w *Writer) manifestName() string { return w.name + ".mf" }
func (w *Writer) diskName() string     { return w.name + "-disk1.vmdk" }

// Where the members' headers and the disk's bytes lie.
func (w *Writer) manifestAt() int64 { return block + roundUp(w.ovf) }
func (w *Writer) diskAt() int64 {
	return w.manifestAt() + block + roundUp(int64(len(w.manifest(nil, nil)))) + block
}

func roundUp(n int64) int64 { return (n + block - 1) / block * block }

// Unit is a grain of the disk's.
func (w *Writer) Unit() int64 { return w.disk.Unit() }

// Ordered is true: the disk is a stream.
func (w *Writer) Ordered() bool { return true }

// WriteAt takes what the disk's stream takes.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) { return w.disk.WriteAt(p, off) }

// Warnings says what the disk has that was not asked for.
func (w *Writer) Warnings() []string { return w.disk.Warnings() }

// Finish ends the disk, puts descriptor and manifest before it and, once all
// that is durable, the header of the first member, without which there is no
// archive.
func (w *Writer) Finish() error {
	if w.closed {
		return nil
	}
	bytes, err := w.disk.End()
	if err != nil {
		return err
	}
	if err := w.disk.Commit(); err != nil {
		return err
	}
	text := w.descriptor(bytes, w.disk.Capacity(), w.disk.Populated())
	text = append(text, strings.Repeat("\n", int(w.ovf)-len(text))...)
	ovfSum := sha256.Sum256(text)
	manifest := w.manifest(ovfSum[:], w.sum.Sum(nil))
	first, err := w.header(w.ovfName(), w.ovf)
	if err != nil {
		return err
	}
	for _, part := range []struct {
		name  string
		bytes int64
		at    int64
		text  []byte
	}{
		{w.manifestName(), int64(len(manifest)), w.manifestAt(), manifest},
		{w.diskName(), bytes, w.diskAt() - block, nil},
	} {
		h, err := w.header(part.name, part.bytes)
		if err != nil {
			return err
		}
		if _, err := w.file.WriteAt(append(h, part.text...), part.at); err != nil {
			return err
		}
	}
	if _, err := w.file.WriteAt(text, block); err != nil {
		return err
	}
	if err := w.file.Truncate(w.diskAt() + bytes + 2*block); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(first, 0); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	w.closed = true
	if err := w.file.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.file.Name())
}

// Close releases the file, which is no appliance unless Finish returned nil.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	w.disk.Stop()
	return w.file.Close()
}

// header is a member's block in the archive. The standard asks for USTAR,
// whose sizes end at 8 GiB; a larger one is written as GNU's and all tars
// since read it, in the same place and without a further block.
func (w *Writer) header(name string, size int64) ([]byte, error) {
	h := &tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644,
		ModTime: w.now.Truncate(time.Second), Format: tar.FormatUSTAR,
	}
	if size >= 8<<30 {
		h.Format = tar.FormatGNU
	}
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(h)
	if err == nil && b.Len() != block {
		err = fmt.Errorf("a tar header of %d bytes", b.Len())
	}
	return b.Bytes(), err
}

// manifest lists the sums of the other members.
func (w *Writer) manifest(ovf, disk []byte) []byte {
	if ovf == nil {
		ovf, disk = make([]byte, sha256.Size), make([]byte, sha256.Size)
	}
	return fmt.Appendf(nil, "SHA256(%s)= %x\nSHA256(%s)= %x\n", w.ovfName(), ovf, w.diskName(), disk)
}

// descriptor is a machine around the disk. What the machine was is not in an
// image, so it is a modest one, for its importer to change. It has no network:
// a copy of a server that answers in its name unasked does harm.
func (w *Writer) descriptor(bytes, capacity, populated int64) []byte {
	return fmt.Appendf(nil, envelopeText,
		escape(w.diskName()), bytes, capacity, populated, escape(w.name), escape(w.name), escape(w.name))
}

func escape(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s))
	return b.String()
}

const envelopeText = `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:id="file1" ovf:href="%s" ovf:size="%d"/>
  </References>
  <DiskSection>
    <Info>The disks</Info>
    <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="%d" ovf:capacityAllocationUnits="byte" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="%d"/>
  </DiskSection>
  <VirtualSystem ovf:id="%s">
    <Info>A machine for one disk</Info>
    <Name>%s</Name>
    <OperatingSystemSection ovf:id="102" vmw:osType="otherGuest64">
      <Info>The guest operating system</Info>
      <Description>Other 64-bit</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Modest hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>%s</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Number of virtual CPUs</rasd:Description>
        <rasd:ElementName>2 virtual CPUs</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>2</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory size</rasd:Description>
        <rasd:ElementName>4096 MB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>4096</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>Hard disk 1</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
`
