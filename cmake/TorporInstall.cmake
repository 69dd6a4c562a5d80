# install() and export for `find_package(torpor)`; filled in once every room stands.
