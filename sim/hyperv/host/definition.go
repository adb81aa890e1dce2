package host

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// Bounds of a definition file.
const (
	maxDefinition      = 8 << 20
	maxDefinitionParts = 4096
)

// definitionMagic begins a definition file (.vmcx). What follows is this
// simulator's own: the content of a real one is binary, and nobody describes it.
//
//	magic | SHA-256 of all that follows, in hex, and a line feed | the settings | each resource's settings
//
// Settings are embedded instances as CIM-XML, one a line.
const definitionMagic = "simulated Hyper-V configuration 2\n"

var errDefinition = errors.New("the file is no configuration of a virtual machine, or it is damaged (0x80070570)")

// encode writes c as a definition file's content.
func (c *config) encode() []byte {
	var body bytes.Buffer
	body.WriteString(c.vssd.Embedded() + "\n")
	for _, p := range c.parts {
		body.WriteString(p.Embedded() + "\n")
	}
	sum := sha256.Sum256(body.Bytes())
	return append(fmt.Appendf(nil, "%s%x\n", definitionMagic, sum), body.Bytes()...)
}

// parseDefinition reads a definition file's content.
func parseDefinition(p []byte) (*config, error) {
	rest, ok := bytes.CutPrefix(p, []byte(definitionMagic))
	sum, body, lines := bytes.Cut(rest, []byte("\n"))
	if !ok || !lines || len(p) > maxDefinition || fmt.Sprintf("%x", sha256.Sum256(body)) != string(sum) {
		return nil, errDefinition
	}
	c := &config{}
	r := bufio.NewReader(bytes.NewReader(body))
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF && line == "" {
			break
		}
		if err != nil || len(c.parts) >= maxDefinitionParts {
			return nil, errDefinition
		}
		i, err := cim.ParseEmbedded(cim.Virtualization, line)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: %w", errDefinition, err)
		case c.vssd == nil && i.Class.Is("Msvm_VirtualSystemSettingData"):
			c.vssd = i
		case c.vssd != nil && i.Class.Is("CIM_ResourceAllocationSettingData"), c.vssd != nil && i.Class.Is("Msvm_SecuritySettingData"):
			c.parts = append(c.parts, i)
		default:
			return nil, fmt.Errorf("%w: %s", errDefinition, i.Class.Name)
		}
	}
	if c.vssd == nil {
		return nil, errDefinition
	}
	id, ok := strings.CutPrefix(c.vssd.Get("InstanceID").String(), "Microsoft:")
	if !ok || id == "" || strings.ContainsAny(id, `\/.`) {
		return nil, errDefinition
	}
	for _, p := range c.parts {
		if !strings.HasPrefix(p.Get("InstanceID").String(), "Microsoft:"+id+`\`) {
			return nil, errDefinition
		}
	}
	c.id = id
	return c, nil
}

// readDefinition reads the definition file of that path.
func (h *Host) readDefinition(path string) (*config, error) {
	f, err := os.Open(h.local(path))
	if err != nil {
		return nil, problem{text: fmt.Sprintf("'%s' cannot be read: %s", path, notFoundText)}
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxDefinition+1))
	if err != nil {
		return nil, problem{text: fmt.Sprintf("'%s' cannot be read: %v", path, err)}
	}
	c, err := parseDefinition(p)
	if err != nil {
		return nil, problem{text: fmt.Sprintf("'%s': %v", path, err)}
	}
	return c, nil
}

// Extensions of a configuration's files.
const (
	extDefinition = ".vmcx"
	extRuntime    = ".vmrs"
	extGuest      = ".vmgs"
)

// definition is the path of c's definition file.
func (c *config) definition() string {
	return c.vssd.Get("ConfigurationDataRoot").String() + `\` + c.vssd.Get("ConfigurationFile").String()
}

// stem is the path of c's files without an extension.
func (c *config) stem() string { return strings.TrimSuffix(c.definition(), extDefinition) }

// writeFiles makes a configuration's files, or writes its definition anew.
func (h *Host) writeFiles(c *config) error {
	stem := h.local(c.stem())
	if err := os.MkdirAll(filepath.Dir(stem), 0o755); err != nil {
		return err
	}
	for ext, content := range map[string]string{extRuntime: "simulated run-time state\n", extGuest: "simulated guest state of " + c.id + "\n"} {
		if _, err := os.Stat(stem + ext); err == nil {
			continue
		}
		if err := os.WriteFile(stem+ext, []byte(content), 0o644); err != nil {
			return err
		}
	}
	// Who reads it through a share sees the old one or the new one, and no half.
	next := stem + ".new"
	if err := os.WriteFile(next, c.encode(), 0o644); err != nil {
		return err
	}
	return os.Rename(next, stem+extDefinition)
}

// removeFiles takes a configuration's files away.
func (h *Host) removeFiles(c *config) error {
	var all error
	for _, ext := range []string{extDefinition, extRuntime, extGuest} {
		if err := os.Remove(h.local(c.stem()) + ext); err != nil && !errors.Is(err, os.ErrNotExist) {
			all = errors.Join(all, err)
		}
	}
	return all
}

// adoptFiles copies the run-time and guest state that lie beside an imported
// definition to where c has its own.
func (h *Host) adoptFiles(c *config, imported string) error {
	from, to := h.local(strings.TrimSuffix(imported, extDefinition)), h.local(c.stem())
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	for _, ext := range []string{extRuntime, extGuest} {
		p, err := os.ReadFile(from + ext)
		if errors.Is(err, os.ErrNotExist) || from == to {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(to+ext, p, 0o644); err != nil {
			return err
		}
	}
	return nil
}
