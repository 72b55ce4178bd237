package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// importAny imports an image of any format qemu-img knows. One that is not raw is
// converted into a sparse file beside it first: qemu-img's own NBD client would
// write zeros where the image has holes.
func (s *session) importAny(ctx context.Context, name, path string, size uint64, replicas uint32) error {
	format, err := imageFormat(ctx, path)
	if err != nil {
		return err
	}
	if format == "raw" {
		return s.importImage(ctx, name, path, size, replicas)
	}
	if err := checkImage(ctx, path, format); err != nil {
		return err
	}
	if _, err := s.volume(ctx, name); err == nil { // not only when it is converted
		return status.Errorf(status.Exists, "volume %s exists already: choose another name", name)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".cairn-import-")
	if err != nil { // beside it would be on a disk that has room for such things
		dir, err = os.MkdirTemp("", "cairn-import-")
	}
	if err != nil {
		return fmt.Errorf("no room to convert the image: %w", err)
	}
	raw := filepath.Join(dir, "raw")
	say("converting %s from %s", path, format)
	err = qemuImg(ctx, nil, "convert", "-f", format, "-O", "raw", path, raw)
	if err == nil {
		err = s.importImage(ctx, name, raw, size, replicas)
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// imageFormat tells what an image is. Only formats with a magic number are
// looked for: anything else is raw, and needs no qemu-img.
func imageFormat(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("cannot read the image: %w", err)
	}
	head := make([]byte, 8)
	n, err := f.Read(head)
	if cerr := f.Close(); cerr != nil {
		return "", cerr
	}
	if err != nil || n < len(head) {
		return "raw", nil // too short, or empty: importImage says what is wrong
	}
	known := false
	for _, magic := range []string{"QFI\xfb", "KDMV", "COWD", "conectix", "vhdxfile", "QED\x00"} {
		known = known || bytes.HasPrefix(head, []byte(magic))
	}
	if !known {
		return "raw", nil
	}
	var info struct {
		Format  string `json:"format"`
		Backing string `json:"backing-filename"`
	}
	if err := qemuImg(ctx, &info, "info", "--output=json", path); err != nil {
		return "", err
	}
	if info.Backing != "" { // a foreign image may name any file of this machine
		return "", status.Errorf(status.Permission, "%s is only a part of an image, over %s: flatten it with `qemu-img rebase -b \"\"` if that file is what it should show", path, info.Backing)
	}
	return info.Format, nil
}

// checkImage refuses a damaged image: where one is cut short, qemu-img's conversion
// has zeros and says nothing.
func checkImage(ctx context.Context, path, format string) error {
	const leaks, cannot = 3, 63 // exit statuses: only space is lost; no check for this format
	err := qemuImg(ctx, nil, "check", "-q", "-f", format, path)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() != leaks && exit.ExitCode() != cannot {
		return status.Errorf(status.Corrupt, "image %s is damaged or cut short: get it again; `qemu-img check %s` says more", path, path)
	}
	if exit == nil {
		return err
	}
	return nil
}

// qemuImg runs qemu-img; out, if not nil, takes its JSON.
func qemuImg(ctx context.Context, out any, args ...string) error {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return status.Errorf(status.Unsupported, "an image that is not raw needs qemu-img: install qemu-utils, or convert it elsewhere")
	}
	if err != nil {
		said, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		return fmt.Errorf("qemu-img %s failed: %w: %s", args[0], err, said)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
		return fmt.Errorf("qemu-img %s answered what is no JSON: %w", args[0], err)
	}
	return nil
}
