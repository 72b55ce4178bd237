package guest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// moduleName is the kernel's own spelling: it treats - and _ alike.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// moduleDepends reads which modules a module file needs. The package has no
// modules.dep (depmod runs at installation, and nothing is installed here),
// but every module carries the list.
func moduleDepends(file string) (deps []string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, status.Errorf(status.IO, "read module: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = status.Errorf(status.IO, "read module: %w", cerr)
		}
	}()
	e, err := elf.NewFile(f)
	if err != nil {
		return nil, status.Errorf(status.Corrupt, "module %s: %w", file, err)
	}
	sec := e.Section(".modinfo")
	if sec == nil {
		return nil, status.Errorf(status.Corrupt, "module %s has no .modinfo section", file)
	}
	info, err := sec.Data()
	if err != nil {
		return nil, status.Errorf(status.Corrupt, "module %s: %w", file, err)
	}
	return dependsField(info), nil
}

// dependsField reads the depends= entry of a .modinfo section, NUL-separated
// key=value strings.
func dependsField(info []byte) []string {
	for _, kv := range bytes.Split(info, []byte{0}) {
		v, ok := bytes.CutPrefix(kv, []byte("depends="))
		if !ok || len(v) == 0 {
			continue
		}
		var out []string
		for _, name := range strings.Split(string(v), ",") {
			out = append(out, moduleName(name))
		}
		return out
	}
	return nil
}

// loadOrder returns wanted and everything it needs, each after its own needs.
func loadOrder(wanted []string, depends func(string) ([]string, error)) ([]string, error) {
	var order []string
	state := map[string]int{} // 1: on the way, 2: in order
	var visit func(name string) error
	visit = func(name string) error {
		switch state[name] {
		case 1:
			return status.Errorf(status.Corrupt, "module %s needs itself", name)
		case 2:
			return nil
		}
		state[name] = 1
		deps, err := depends(name)
		if err != nil {
			return err
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		state[name] = 2
		order = append(order, name)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}
