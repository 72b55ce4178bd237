package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/kernel"
	"github.com/cairnstore/cairn/proto/status"
)

func deviceCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "device", Aliases: []string{"dev"}, Short: "Volumes as block devices of this machine's kernel"}
	cmd.AddCommand(deviceAttach(), deviceList(), deviceDetach(), deviceKeep())
	return cmd
}

// deviceFlags are those of every command that attaches a device.
func deviceFlags(cmd *cobra.Command, kc *kernel.Config) {
	f := cmd.Flags()
	f.IntVar(&kc.Connections, "connections", 4, "connections of a device")
	f.DurationVar(&kc.Timeout, "timeout", 12*time.Second, "how long a device's request may take before it is sent over another connection")
	f.DurationVar(&kc.DeadTimeout, "dead-timeout", 10*time.Minute, "how long a device's requests wait, without an error, for a server that is gone")
}

// attachDevice makes an export a device and starts what keeps it. One that is a
// device already is kept, from now on if it was not.
func attachDevice(ctx context.Context, kc kernel.Config) (path string, err error) {
	devices, err := kernel.Devices()
	if err != nil {
		return "", err
	}
	d := kernel.Device{}
	for _, have := range devices {
		if have.URI == kc.URI {
			d = have
		}
	}
	if d.Path == "" {
		if d, err = kernel.Attach(ctx, kc); err != nil {
			return "", err
		}
	}
	kc.Index = d.Index
	if err := startKeeper(kc); err != nil {
		return "", fmt.Errorf("%s is attached, but nothing keeps it connected: %w", d.Path, err)
	}
	return d.Path, nil
}

// keeperLog is where a device's keeper writes.
func keeperLog(index int) string {
	dir := "/run/cairn"
	if os.MkdirAll(dir, 0o755) != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, fmt.Sprintf("nbd%d.log", index))
}

// startKeeper starts this program as a device's keeper, in a session of its
// own: it has to outlive this command.
func startKeeper(kc kernel.Config) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(keeperLog(kc.Index), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command(exe, "device", "keep", strconv.Itoa(kc.Index), kc.URI,
		"--dead-timeout", kc.DeadTimeout.String(), "--connections", strconv.Itoa(kc.Connections))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	if cerr := log.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return cmd.Process.Release()
}

func deviceAttach() *cobra.Command {
	var kc kernel.Config
	var on string
	cmd := &cobra.Command{
		Use:   "attach URI",
		Short: "Make an NBD export a block device of this machine, and print its path",
		Long: `Make an NBD export a block device of this machine, and print its path, alone.
` + "`cairn volume attach NAME --device`" + ` does that for a volume; this command needs no cluster.`,
		Example: "  cairn device attach nbd://10.0.0.1/db\n  mount $(cairn device attach 'nbd+unix:///db?socket=/run/cairn/nbd.sock') /srv",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			kc.URI, kc.Index = args[0], -1
			if on != "" {
				i, err := kernel.ParseDevice(on)
				if err != nil {
					return err
				}
				kc.Index = i
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), cliWait)
			defer cancel()
			path, err := attachDevice(ctx, kc)
			if err == nil {
				fmt.Println(path)
			}
			return err
		},
	}
	deviceFlags(cmd, &kc)
	cmd.Flags().StringVar(&on, "on", "", "which device, such as /dev/nbd3 (default: the first that is free)")
	return cmd
}

// deviceView is a device as `-o json` shows it.
type deviceView struct {
	Path      string `json:"path"`
	URI       string `json:"uri"`
	SizeBytes uint64 `json:"sizeBytes"`
}

func deviceList() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn device ls -o json",
		Use:     "ls", Short: "List this machine's NBD devices", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			devices, err := kernel.Devices()
			if err != nil {
				return err
			}
			views, rows := []deviceView{}, [][]string{}
			for _, d := range devices {
				views = append(views, deviceView{d.Path, d.URI, d.SizeBytes})
				rows = append(rows, []string{d.Path, formatSize(d.SizeBytes), dash(d.URI)})
			}
			return out.show(views, []string{"DEVICE", "SIZE", "URI"}, rows)
		},
	}
	out.register(cmd)
	return cmd
}

func deviceDetach() *cobra.Command {
	return &cobra.Command{
		Use: "detach DEVICE", Short: "Disconnect a block device; unmount it first", Args: cobra.ExactArgs(1),
		Example: "  umount /srv && cairn device detach /dev/nbd0",
		RunE: func(cmd *cobra.Command, args []string) error {
			i, err := kernel.ParseDevice(args[0])
			if err != nil {
				return err
			}
			if err := unused(i); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), cliWait)
			defer cancel()
			return kernel.Detach(ctx, i)
		},
	}
}

// unused refuses a device that is mounted or otherwise held: opening it
// exclusively fails then.
func unused(index int) error {
	path := fmt.Sprintf("/dev/nbd%d", index)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL, 0)
	switch {
	case err == nil:
		return f.Close()
	case os.IsNotExist(err):
		return status.Errorf(status.NotFound, "%s is not attached", path)
	}
	return status.Errorf(status.Held, "%s is in use (%w): unmount it first", path, err)
}

// deviceFree refuses to let go of a volume that is a device of this machine.
func deviceFree(volume string) error {
	devices, err := kernel.Devices()
	if err != nil {
		return err
	}
	for _, d := range devices {
		if u, err := client.ParseURI(d.URI); err == nil && u.Export == volume {
			return status.Errorf(status.Held, "volume %s is the device %s of this machine: `cairn device detach %s` lets it go", volume, d.Path, d.Path)
		}
	}
	return nil
}

func deviceKeep() *cobra.Command {
	var kc kernel.Config
	cmd := &cobra.Command{
		Use:   "keep INDEX URI",
		Short: "Keep a device connected, and let it grow, until it is detached",
		Long: `Keep a device connected, and let it grow, until it is detached. Attaching starts one of
these for each device; it may be killed and started again at any time.`,
		Example: "  cairn device keep 0 nbd://10.0.0.1/db",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			i, err := kernel.ParseDevice(args[0])
			if err != nil {
				return err
			}
			kc.Index, kc.URI, kc.Log = i, args[1], daemonLog("text")
			return kernel.Keep(cmd.Context(), kc)
		},
	}
	deviceFlags(cmd, &kc)
	return cmd
}
